"""What the processor can do that decides how numbers are computed."""

from __future__ import annotations

import os


def cpu_has_fast_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware: AMX or AVX512-BF16, and oneDNN is allowed to."""
    import torch

    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(word in limit for word in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")):
        return False
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
