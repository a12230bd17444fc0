// Judge an image file with an exported model: verdict MODEL.xml IMAGE.ppm
// OpenVINO reads no image files. Here it is a binary PPM (`magick part.png part.ppm`); with OpenCV use cv::imread.
#include <fstream>
#include <iostream>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

ov::Tensor read_ppm(const std::string& name) {
    std::ifstream file(name, std::ios::binary);
    std::string kind;
    size_t width = 0, height = 0, white = 0;
    file >> kind >> width >> height >> white;
    file.get();  // one white space ends the header
    if (!file || kind != "P6" || white != 255) throw std::runtime_error(name + " is not a binary PPM of 8 bits.");
    std::vector<unsigned char> bytes(3 * height * width);
    if (!file.read(reinterpret_cast<char*>(bytes.data()), bytes.size())) throw std::runtime_error(name + " is cut off.");
    ov::Tensor image(ov::element::f32, {1, 3, height, width});  // RGB, 0 to 1
    for (size_t pixel = 0; pixel < height * width; ++pixel)
        for (size_t channel = 0; channel < 3; ++channel)
            image.data<float>()[channel * height * width + pixel] = bytes[3 * pixel + channel] / 255.0f;
    return image;
}

int main(int argc, char** argv) try {
    if (argc != 3) throw std::runtime_error("usage: verdict MODEL.xml IMAGE.ppm");
    ov::Core core;
    auto model = core.read_model(argv[1]);
    auto number = [&](const char* name) { return std::stof(model->get_rt_info<std::string>("framework", name)); };
    // Without the hint OpenVINO computes in bfloat16 where a processor can, which costs accuracy.
    auto request = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32)).create_infer_request();
    request.set_input_tensor(read_ppm(argv[2]));
    request.infer();
    float score = request.get_tensor("pred_score").data<float>()[0], low = number("probability_at_0");
    auto verdict = score < number("accept_below") ? "accept" : score >= number("reject_from") ? "reject" : "review";
    std::cout << argv[2] << ": " << verdict << ", probability " << low + (number("probability_at_1") - low) * score << "\n";
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
