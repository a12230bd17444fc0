"""The parts of `anomalib compare`: what each method gets, one run in a process of its own, and what came out."""
