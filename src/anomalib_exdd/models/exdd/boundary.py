"""A learnt boundary between normal and defect patches: small networks on patch features, learnt from the memory banks.

Nearest neighbours weigh all directions of the feature space alike; a network finds those in which defects differ. One
network is learnt for each fold of the training images on the other folds, so that every training image has an
out-of-fold score. New images get the mean of all networks.

Shape suffixes: N patches, D features, H hidden units of one network, K networks (folds), S images.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_exdd.utils.distributed import gather_objects
from anomalib_exdd.utils.precision import Float32Buffers, full_float32, one_thread

MAX_FOLDS = 5  # networks, at most; there are no more than defective images
HIDDEN = 64
STEPS = 400  # steps of the optimizer
_PARAMETERS = ("weight_in", "bias_in", "weight_out", "bias_out")
_NORMAL_BATCH, _DEFECT_BATCH = 256, 128
_LEARNING_RATE, _WEIGHT_DECAY = 4e-3, 1e-2
_SLOPE = 0.2  # of the leaky rectifier


class BoundaryData(NamedTuple):
    """Patches to learn the boundary from."""

    features: Tensor  # float32, shape (N, D)
    defective: Tensor  # whether each patch is defect, boolean, shape (N,)
    image: Tensor  # of each patch, int64, shape (N,)
    weight: Tensor  # how much each defective image counts against the others, float, shape (S,)
    held_out: Tensor  # which networks must not be trained on each image, boolean, shape (S, K)

    def shares(self, fold: int) -> tuple[Tensor, Tensor]:
        """Return how often a network sees each patch as a normal one and as a defect, float64, shapes (N,)."""
        image, defective = self.image.cpu(), self.defective.cpu()
        seen_N = ~self.held_out.cpu()[image, fold]
        counts = torch.bincount(image[defective], minlength=len(self.weight)).clamp_min(1)
        per_image = self.weight.cpu().double() / counts
        return (seen_N & ~defective).double(), (seen_N & defective) * per_image[image]

    @property
    def is_complete(self) -> bool:
        """Whether every network sees both kinds of patches."""
        return all(bool(share.any()) for fold in range(self.held_out.shape[1]) for share in self.shares(fold))


class LearntBoundary(DynamicBufferMixin, Float32Buffers):
    """Log-odds of a patch being defect, from networks with one hidden layer, all of them in one product."""

    weight_in: Tensor  # of the hidden units of all networks, next to each other, float32, shape (D, K H)
    bias_in: Tensor  # shape (K H,)
    weight_out: Tensor  # shape (K, H)
    bias_out: Tensor  # shape (K,)

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    @property
    def is_fitted(self) -> bool:
        """Whether there is a boundary: it takes two defective images at least."""
        return self.weight_in.numel() > 0

    @property
    def folds(self) -> int:
        """Number of networks."""
        return len(self.bias_out)

    def clear(self) -> None:
        """Forget what was learnt."""
        device = self.weight_in.device if "weight_in" in self._buffers else None
        for name in _PARAMETERS:
            self.register_buffer(name, torch.empty(0, device=device))

    def forward(self, features_ND: Tensor) -> Tensor:
        """Return the mean log-odds of all networks for patches (..., D), float32, shape (...)."""
        weight_out, bias_out = self.weight_out / self.folds, self.bias_out / self.folds
        with nullcontext() if torch.compiler.is_compiling() else full_float32(features_ND.device):
            log_odds_N = _log_odds(features_ND, self.weight_in, self.bias_in, weight_out, bias_out)
        return log_odds_N.reshape(features_ND.shape[:-1])

    def of_fold(self, features_ND: Tensor, fold: int) -> Tensor:
        """Return the log-odds of one network, float32, shape (N,)."""
        block, one = slice(fold * HIDDEN, (fold + 1) * HIDDEN), slice(fold, fold + 1)
        inner, outer = (self.weight_in[:, block], self.bias_in[block]), (self.weight_out[one], self.bias_out[one])
        with full_float32(features_ND.device):
            return _log_odds(features_ND, *inner, *outer)

    def fit(self, data: BoundaryData, seed: int = 0) -> None:
        """Learn the networks on the device of the features, reproducibly for any number of threads and processes.

        Batches have normal and defect patches, each defective image with the same share. Features are centred on the
        normal ones and divided by one number: to standardise each of them was worse on the development sets.
        """
        # Half precision takes away what differs between batch sizes, threads and processes in a feature's last digits.
        features_ND = data.features.half().float()
        workers = torch.get_num_threads()
        with torch.inference_mode(mode=False), full_float32(features_ND.device), one_thread():
            found = _learn(features_ND.clone(), data, seed, workers)
        # Where processes train side by side, all of them take what the first has learnt.
        found = gather_objects([value.cpu() for value in found])[0]
        for name, value in zip(_PARAMETERS, found, strict=True):
            self.register_buffer(name, value.to(features_ND.device))


def _log_odds(
    features_ND: Tensor, weight_in_DU: Tensor, bias_in_U: Tensor, weight_out_KH: Tensor, bias_out_K: Tensor
) -> Tensor:
    """Return the sum of networks whose units U lie next to each other, shape (N,).

    They are convolutions over 1 x 1 pixels, which oneDNN computes twice as fast as MKL a product on AMD's processors.
    """
    pixels_1DN1 = features_ND.reshape(1, -1, 1, features_ND.shape[-1]).permute(0, 3, 1, 2)
    hidden = F.leaky_relu(F.conv2d(pixels_1DN1, weight_in_DU.T[:, :, None, None], bias_in_U), _SLOPE)
    return F.conv2d(hidden, weight_out_KH.reshape(1, -1, 1, 1), bias_out_K.sum().reshape(1)).flatten()


def _learn(features_ND: Tensor, data: BoundaryData, seed: int, workers: int) -> list[Tensor]:
    """Learn the networks, and fold the scaling of the features into their first weights."""
    dimension, folds = features_ND.shape[1], data.held_out.shape[1]
    normal_ND = features_ND[~data.defective]
    centre_D = normal_ND.mean(dim=0)
    scale = (normal_ND - centre_D).square().mean().sqrt().clamp_min(1e-12)
    scaled_ND = (features_ND - centre_D) / scale
    generator = torch.Generator().manual_seed(seed)
    batches = [_batches(data, fold, generator).to(features_ND.device) for fold in range(folds)]
    weight_in_KDH = torch.randn(folds, dimension, HIDDEN, generator=generator) * (2 / dimension) ** 0.5
    weight_out_KH = torch.randn(folds, HIDDEN, generator=generator) * HIDDEN**-0.5
    # The networks know nothing of each other: each is learnt by one thread, several at a time.
    with ThreadPoolExecutor(workers) as pool:
        networks = list(pool.map(partial(_learn_network, scaled_ND), batches, weight_in_KDH, weight_out_KH))
    weight_in_KDH, bias_in_KH, weight_out_KH, bias_out_K = map(torch.stack, zip(*networks, strict=True))
    weight_in = (weight_in_KDH / scale).transpose(0, 1).flatten(1)
    return [weight_in, bias_in_KH.flatten() - centre_D @ weight_in, weight_out_KH, bias_out_K]


def _learn_network(scaled_ND: Tensor, batches_TB: Tensor, weight_in_DH: Tensor, weight_out_H: Tensor) -> list[Tensor]:
    """Learn one network, from the rows of its batches and its initial weights; return its :data:`_PARAMETERS`."""
    initial = [weight_in_DH, weight_in_DH.new_zeros(HIDDEN), weight_out_H, weight_out_H.new_zeros(())]
    parameters = [value.to(scaled_ND.device, copy=True).requires_grad_() for value in initial]
    weight_in, bias_in, weight_out, bias_out = parameters
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=len(batches_TB))
    target_B = torch.cat([torch.zeros(_NORMAL_BATCH), torch.ones(_DEFECT_BATCH)]).to(scaled_ND.device)
    with torch.inference_mode(mode=False), torch.enable_grad(), one_thread():  # settings of the thread
        for batch_B in batches_TB:
            hidden_BH = F.leaky_relu(torch.addmm(bias_in, scaled_ND.index_select(0, batch_B), weight_in), _SLOPE)
            logit_B = (hidden_BH * weight_out).sum(dim=-1) + bias_out
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logit_B, target_B).backward()
            optimizer.step()
            schedule.step()
    return [value.detach() for value in parameters]


def _batches(data: BoundaryData, fold: int, generator: torch.Generator) -> Tensor:
    """Draw the rows of all batches of a network with replacement, normal ones first, int64, shape (steps, batch)."""
    batches = []
    for share_N, size in zip(data.shares(fold), (_NORMAL_BATCH, _DEFECT_BATCH), strict=True):
        bounds = share_N.cumsum(0)
        at = torch.rand(STEPS * size, generator=generator, dtype=torch.float64) * bounds[-1]
        rows = torch.searchsorted(bounds, at, right=True).clamp_max(int(share_N.nonzero().max()))
        batches.append(rows.reshape(STEPS, size))
    return torch.cat(batches, dim=1)


class Folds:
    """Assigns training images to folds, by the hashes of their names: the same ones whatever order and folder.

    Synthetic images, those in ``origins``, share the fold of the real defect that they were made from, and are held out
    wherever one of their origins is. With ``synthetic_count`` they have folds of their own if there are no real ones.
    """

    def __init__(
        self,
        normal: Collection[str],
        defective: Collection[str],
        origins: Mapping[str, Sequence[str]],
        *,
        synthetic_count: bool = False,
    ) -> None:
        real = [path for path in defective if path not in origins]
        made = [path for path in defective if path in origins]
        assigned = defective if synthetic_count and not real else real
        self.count = min(MAX_FOLDS, len(assigned))
        self._origins = origins
        self._fold: dict[str, int] = {}
        for paths in (assigned, normal):
            for number, path in enumerate(sorted(paths, key=name_hash)):
                self._fold[path] = number % max(1, self.count)
        for number, path in enumerate(sorted(made, key=name_hash)):
            known = [origin for origin in origins[path] if origin in self._fold]
            of_defect = [origin for origin in known if origin in real]
            fold = self._fold[(of_defect or known)[0]] if known else number % max(1, self.count)
            self._fold.setdefault(path, fold)

    def of(self, path: str) -> int:
        """Return the fold of an image; of an unknown one the first."""
        return self._fold.get(path, 0)

    def held_out(self, path: str) -> list[bool]:
        """Tell which networks must not be trained on an image or on what was made from it or it was made from."""
        folds = {self.of(each) for each in (path, *self._origins.get(path, ())) if each in self._fold}
        return [fold in folds for fold in range(self.count)]


def name_hash(path: str) -> tuple[bytes, str]:
    """Return a key that sorts images by the hash of their file names, at random but always alike."""
    return hashlib.sha256(path.replace("\\", "/").rsplit("/", 1)[-1].encode()).digest(), path


def boundary_data(
    parts: Sequence[tuple[Tensor, Sequence[str], bool]], folds: Folds, weights: Mapping[str, float]
) -> BoundaryData:
    """Put patches from several places together: features (N, D), the image of each, and whether they are defect.

    Defective images count 1 but for ``weights``.
    """
    names = sorted({name for _, images, _ in parts for name in images})
    row = {name: index for index, name in enumerate(names)}
    device: Any = parts[0][0].device
    return BoundaryData(
        torch.cat([features.float() for features, _, _ in parts]),
        torch.cat([torch.full((len(features),), defective) for features, _, defective in parts]).to(device),
        torch.tensor([row[name] for _, images, _ in parts for name in images]).to(device),
        torch.tensor([weights.get(name, 1.0) for name in names]),
        torch.tensor([folds.held_out(name) for name in names], dtype=torch.bool).reshape(len(names), folds.count),
    )
