"""Which kernels a model gets."""

import logging

from perigee.kvstore.blocks import DType
from perigee.workers.kernels.base import Kernels
from perigee.workers.kernels.build import NativeUnavailable
from perigee.workers.kernels.native import load
from perigee.workers.kernels.reference import TorchKernels

logger = logging.getLogger(__name__)


def select(dtype: DType) -> Kernels:
    """Native kernels for bfloat16 where the machine has the instructions, torch's for all else."""
    if dtype != "bfloat16":
        return TorchKernels()
    try:
        return load()
    except NativeUnavailable as error:
        logger.warning("native kernels unavailable, torch's are used reason=%s", error)
        return TorchKernels()
