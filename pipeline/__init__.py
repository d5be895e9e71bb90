"""MoleForge: train a mixture of experts in parts and serve it as one model."""

import logging

__version__ = "0.1.0"

logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # peft imports it, and it remarks on kernels nobody asked for
