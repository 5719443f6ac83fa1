"""The machine: settings for deterministic training, random seeds, and a description for run.json."""

import ctypes
import os
import platform
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

CPU = torch.device("cpu")


def seed_everything(seed: int, epoch: int, device: torch.device) -> torch.Generator:
    """Seed torch, numpy and `random` from seed and epoch alone, and return a generator for the batches.

    Each gets its own words of one SeedSequence, so that all streams are independent.
    """
    words = np.random.SeedSequence((seed, epoch)).generate_state(4).tolist()
    for_torch, for_batches, for_numpy, for_random = words
    torch.default_generator.manual_seed(for_torch)
    if device.type != "cpu":  # torch.manual_seed would also reseed GPUs that are not used here
        torch.manual_seed(for_torch)
    np.random.seed(for_numpy)  # noqa: NPY002 - the user's code may draw from the global generator
    random.seed(for_random)
    return torch.Generator().manual_seed(for_batches)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Make training the same in every process: one thread, deterministic float32 kernels, no denormals.

    torch's modes and defaults, such as autocast, are reset too. A network this small gains nothing from a second
    thread, and sums over several threads depend on their number. The caller's settings and random states are restored
    at the end.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else []  # do not initialise an idle GPU
    with ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad())
        for kind in dict.fromkeys(("cpu", device.type)):
            if torch.is_autocast_enabled(kind):
                settings.enter_context(torch.autocast(kind, enabled=False))
        # Orders and angles are drawn on the CPU. (torch 2.5 cannot tell its default device once that was set to None.)
        if torch.empty(0).device.type != "cpu":
            settings.enter_context(torch.device("cpu"))
        settings.enter_context(torch.random.fork_rng(devices))
        if device.type == "cuda":
            settings.enter_context(_exact_convolutions())
            settings.enter_context(torch.cuda.stream(_stream(device)))
        flushing = _denormals_are_flushed()
        try:
            torch.set_num_threads(1)
            torch.set_flush_denormal(True)  # weights that L1 and L2 shrink become denormal numbers, slow on a CPU
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_flush_denormal(flushing)
            torch.set_num_threads(threads)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _denormals_are_flushed() -> bool:
    return bool(torch.tensor(2.0**-120) * 2.0**-20 == 0)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which this process trains, since the default stream cannot be recorded.

    All runs share it, because torch keeps freed memory for the stream that used it.
    """
    return torch.cuda.Stream(device)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Use cuDNN's deterministic kernels in full float32, through whichever interface to TF32 this torch has."""
    cudnn = torch.backends.cudnn
    wanted: list[tuple[Any, str, bool | str]] = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    if hasattr(cudnn, "conv"):  # torch refuses a program that uses both interfaces
        wanted.append((cudnn.conv, "fp32_precision", "ieee"))
    else:
        wanted.append((cudnn, "allow_tf32", False))
    before = [getattr(place, setting) for place, setting, _ in wanted]
    try:
        for place, setting, value in wanted:
            setattr(place, setting, value)
        yield
    finally:
        for (place, setting, _), value in zip(wanted, before, strict=True):
            setattr(place, setting, value)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the tensors of the next step or batch.

    A process that trains learns this by itself; one that only evaluates does not, and takes half as long again. Dask
    starts its workers with MALLOC_TRIM_THRESHOLD_, which disables the learning: training then takes twice as long.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    with suppress(AttributeError, OSError, TypeError):  # another system or C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**28)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe this machine for run.json: device, processor, library versions, host and process."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = _cpuinfo().get("model name") or platform.processor() or platform.machine()
        processor = f"{processor} ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": str(device),
        "processor": processor,
        "core": _core(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "host": platform.node(),
        "process": os.getpid(),
    }


def _core() -> str:
    """Family, model, stepping and caches: processors of the same name have given different last digits."""
    names = {"vendor_id": "", "cpu family": "family ", "model": "model ", "stepping": "stepping "}
    cpuinfo = _cpuinfo()
    words = [f"{word}{cpuinfo[name]}" for name, word in names.items() if name in cpuinfo]
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    words += [
        f"L{(cache / 'level').read_text().strip()} {(cache / 'type').read_text().strip().lower()} "
        f"{(cache / 'size').read_text().strip()}"
        for cache in caches
        if all((cache / name).exists() for name in ("level", "type", "size"))
    ]
    return ", ".join(words) or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """The entries of the first core in /proc/cpuinfo on Linux; empty on other systems."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().partition("\n\n")[0] if path.exists() else ""
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
