"""Triton's interpreter, made to run mamba_ssm's kernels on the pretended device.

`TRITON_INTERPRET=1` must be in the environment before Triton is imported. mamba_ssm chooses one
block size a kernel, and measures none, with `MAMBA_DETERMINISTIC=1`.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Products of BF16 blocks. UPSTREAM(triton 3.7): the interpreter stores BF16 as uint16 and
    multiplies those integers, which gives numbers around 1e9."""
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, _widened(a), _widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _widened(block: Any) -> Any:
    """A BF16 block in FP32, any other as it is."""
    if block.dtype.scalar != tl.bfloat16:
        return block
    wide = (block.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)
