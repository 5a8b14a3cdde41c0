"""The device that is chosen is the one that was meant, and a GPU that cannot be used never goes unused in silence."""

from dataclasses import replace

import pytest
import torch

from common import device, processes
from common.script import UsageError
from model import PRESETS
from recipes import RECIPES, fill_defaults

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Play a machine with an NVIDIA driver: machine(cuda, capability), which torch can use if there is a capability."""
    monkeypatch.setattr(device, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(device, "DEVICES", tmp_path)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def play(cuda="13.0", capability=None, kernels=("sm_75", "sm_80", "sm_90a", "compute_120")):
        (tmp_path / "version").write_text(DRIVER)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(kernels))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Tesla V100-SXM2-16GB")

    return play


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_driver_that_is_too_old_is_named_with_the_one_that_is_needed(machine, name):
    machine()
    with pytest.raises(UsageError, match=r"driver 535\.104\.05 .*CUDA 13\.0 needs driver 580.*cu126.*--device cpu"):
        device.choose_device(name)


def test_a_gpu_that_is_older_than_the_kernels_is_named(machine):
    machine(capability=(7, 0))
    with pytest.raises(UsageError, match=r"no kernels for its Tesla V100.* from sm_75 on.*cu126"):
        device.choose_device("auto")


def test_a_torch_without_cuda_is_named(machine):
    machine(cuda=None)
    with pytest.raises(UsageError, match="built without CUDA"):
        device.choose_device("auto")


def test_gpus_that_were_hidden_are_named_so(machine, monkeypatch):
    machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES is ''"):
        device.choose_device("auto")


def test_a_container_that_has_the_driver_but_was_given_no_gpu_takes_the_cpu(machine, tmp_path):
    machine()
    (tmp_path / "nvidia0").rename(tmp_path / "nvidiactl")
    assert device.choose_device("auto") == torch.device("cpu")


def test_the_cpu_can_be_wanted_in_spite_of_such_a_gpu(machine):
    machine()
    assert device.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
def test_a_gpu_with_kernels_is_taken(machine, capability):
    machine(capability=capability)
    assert device.choose_device("auto") == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "compilers", "headers", "compiles"),
    [
        ((9, 0), ["gcc"], ["Python.h"], True),
        ((7, 0), ["clang"], ["Python.h"], True),
        ((6, 1), ["gcc"], ["Python.h"], False),
        ((9, 0), [], ["Python.h"], False),
        ((9, 0), ["gcc"], [], False),
    ],
)
def test_a_model_is_compiled_by_default_where_triton_can(
    machine, monkeypatch, tmp_path, capability, compilers, headers, compiles
):
    machine(capability=capability)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(device.shutil, "which", lambda name: name if name in compilers else None)
    for header in headers:
        (tmp_path / header).touch()
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path))
    config = replace(RECIPES["gpt2"], dtype="bfloat16")
    assert fill_defaults(config, torch.device("cuda", 0), PRESETS["gpt2"]).compile is compiles
    assert fill_defaults(config, torch.device("cpu"), PRESETS["gpt2"]).compile is False


def test_without_a_driver_auto_is_what_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "NVIDIA_DRIVER", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_is_that_of_the_card_or_not_known(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    assert device.peak_flops(torch.device("cuda", 0)) == (tera and tera * 1e12)


@pytest.mark.parametrize(
    ("kind", "native", "dtype"),
    [
        ("cuda", True, "bfloat16"),
        ("cuda", False, "float16"),
        ("cpu", True, "bfloat16"),
        ("cpu", False, "float32"),
        ("mps", True, "float32"),
    ],
)
def test_the_automatic_type_is_the_fastest_that_is_not_emulated(monkeypatch, kind, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    monkeypatch.setattr("recipes.can_compile", lambda device: False)
    assert fill_defaults(RECIPES["gpt2"], torch.device(kind), PRESETS["gpt2"]).dtype == dtype


def test_each_process_of_a_machine_takes_a_gpu_of_its_own_that_is_there(machine, monkeypatch):
    machine(capability=(9, 0))
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with processes.start_processes("auto", timeout=1) as world:
        assert world.device == torch.device("cuda", 3) and calls == [world.device, "high"]
    with pytest.raises(UsageError, match="cuda:8 does not exist: this machine has 8"):
        device.choose_device("cuda", 8)
