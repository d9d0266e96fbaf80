"""Trains, checks and samples a rectified-flow Diffusion Transformer; docs/map.md says what is where."""

import os

# XLA reads its flags when JAX makes the first device. The products of attention's heads run on one core in the library that it
# takes for them (YNNPACK), on all in Eigen: a step on the CPU takes a tenth less. A GPU does not ask.
if "xla_cpu_experimental_ynn_fusion_type" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_experimental_ynn_fusion_type=-individual_dot".strip()
    )
