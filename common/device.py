"""The device that computes: which one, how fast it can be, and what to do when it lacks memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from common.script import UsageError

NVIDIA_DRIVER, DEVICES = Path("/proc/driver/nvidia/version"), Path("/dev")
DRIVER_FOR_CUDA = {"12": "525", "13": "580"}  # by NVIDIA's table of minor version compatibility
OLDER_CUDA = "install torch's cu126 wheels (see pytorch.org), which serve older drivers and GPUs"


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; `auto` is a CUDA GPU, one for each process, else Apple's MPS, else the CPU.

    Raises UsageError for one that is not there, and where torch cannot use the GPU that is.
    """
    if name.startswith(("auto", "cuda")):
        require_usable_gpu()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is not a device: choose auto, cpu, mps, cuda or cuda:N") from None
    if not available.get(device.type):
        raise UsageError(f"--device {name} is not available here: choose from {[k for k in available if available[k]]}")
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", local_rank)
    last = max(device.index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
    if last >= torch.cuda.device_count():
        raise UsageError(f"cuda:{last} does not exist: this machine has {torch.cuda.device_count()} GPUs")
    return device


def require_usable_gpu() -> None:
    """Raise UsageError where an NVIDIA GPU would silently not be used: its driver, or itself, is too old for torch."""
    if not NVIDIA_DRIVER.exists() or not any(DEVICES.glob("nvidia[0-9]*")):  # a container may see the driver alone
        return
    driver = re.search(r"\d+\.[\d.]+", NVIDIA_DRIVER.read_text())
    found = f"an NVIDIA driver {driver[0] if driver else ''} is loaded, but torch {torch.__version__}"
    remedy = f"{OLDER_CUDA}; or choose --device cpu"
    if torch.version.cuda is None:
        raise UsageError(f"{found} was built without CUDA: install one with it, or choose --device cpu")
    if not torch.cuda.is_available():
        needed = DRIVER_FOR_CUDA.get(torch.version.cuda.split(".")[0], "newer")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
        needs = f"its CUDA {torch.version.cuda} needs driver {needed}"
        raise UsageError(f"{found} cannot use its GPU{hidden}: {needs}; update, or {remedy}")
    oldest = min((int(re.search(r"\d+", name)[0]) for name in torch.cuda.get_arch_list()), default=0)  # 75 of sm_75
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor < oldest:
            name = torch.cuda.get_device_name(index)
            raise UsageError(f"{found} has no kernels for its {name}, only from sm_{oldest} on: {remedy}")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 itself; emulated, it may be many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works for a GPU: Triton needs compute capability 7.0, a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    can_build = device.type == "cuda" and compiler is not None and has_headers
    return can_build and torch.cuda.get_device_capability(device) >= (7, 0)


# Dense bf16 (V100: fp16) tensor FLOP/s, summed in fp32; data sheets that give it with sparsity are halved
PEAK_FLOPS = {
    "GB200": 2500e12,  # GB200 NVL72 data sheet: 5 PFLOPS a GPU with sparsity
    "B200": 2250e12,  # HGX B200 data sheet: 4.5 PFLOPS a GPU with sparsity
    "GH200": 989e12,  # GH200 data sheet: 1,979 TFLOPS with sparsity
    "H200 NVL": 835e12,  # H200 data sheet: 1,671 with sparsity
    "H200": 989e12,  # H200 data sheet: 1,979 with sparsity
    "H100 NVL": 835e12,  # H100 data sheet: 1,671 with sparsity
    "H100 PCIe": 756e12,  # H100 data sheet: 1,513 with sparsity
    "H100": 989e12,  # H100 data sheet, SXM: 1,979 with sparsity
    "A100": 312e12,  # A100 data sheet
    "A10": 125e12,  # A10 data sheet
    "L40S": 362e12,  # L40S data sheet: 362.05
    "L4": 121e12,  # L4 data sheet: 242 with sparsity
    "RTX 5090": 209e12,  # RTX Blackwell whitepaper: 209.5
    "RTX 4090": 165e12,  # Ada whitepaper: 165.2
    "RTX 3090": 71e12,  # GA102 whitepaper
    "V100-SXM2": 125e12,  # V100 data sheet, SXM2
}
OTHER_CARDS = r"(?! (?:Ti|D|Laptop)\b)"  # an RTX 3090 Ti is no RTX 3090


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device) -> float | None:
    """The device's peak FLOP/s, None where it is not known."""
    found = (rate for name, rate in PEAK_FLOPS.items() if re.search(rf"\b{name}\b{OTHER_CARDS}", device_name(device)))
    return next(found, None)


def keep_freed_memory() -> None:
    """Let glibc, where it is the C library, keep freed memory for the next tensors.

    By default it returns large blocks to the system, which has to clear each page that is asked for again: half of a
    CPU's training time over `transformers` was that. Until it ends, the process holds its peak memory.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt"):
        c_library.mallopt(M_MMAP_MAX, 0)
        c_library.mallopt(M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def explain_out_of_memory(flag: str) -> Iterator[None]:
    """Turn torch's errors for a lack of memory into a MemoryError that names the flag to lower."""
    try:
        yield
    except RuntimeError as error:
        message = re.search(r".*(out of memory|ALLOC_FAILED|can't allocate memory).*", str(error), re.IGNORECASE)
        if message or type(error).__name__ == "OutOfMemoryError":
            reason = message[0].strip() if message else "no memory left"
            raise MemoryError(f"out of memory: try a smaller {flag} ({reason})") from None
        raise
