"""The machine: settings for deterministic training, random seeds, and a description for run.json."""

import ctypes
import os
import platform
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

CPU = torch.device("cpu")
_ALONE = threading.RLock()  # the threads of a process share the random generators, so they take turns


def seed_everything(seed: int, epoch: int, device: torch.device) -> torch.Generator:
    """Seed torch, numpy and `random` from seed and epoch alone, and return a generator for the batches.

    Each gets its own words of one SeedSequence, so that all streams are independent.
    """
    for_torch, for_batches, for_numpy, for_random = np.random.SeedSequence((seed, epoch)).generate_state(4).tolist()
    torch.default_generator.manual_seed(for_torch)
    if device.type != "cpu":  # torch.manual_seed would also reseed GPUs that are not used here
        torch.manual_seed(for_torch)
    np.random.seed(for_numpy)  # noqa: NPY002 - the user's code may draw from the global generator
    random.seed(for_random)
    return torch.Generator().manual_seed(for_batches)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Make training the same in every process: one thread, deterministic kernels in full float32, no denormals.

    torch's modes and defaults, such as autocast, are reset too. A network this small gains nothing from a second
    thread, and sums over several threads depend on their number. The caller's settings and random states are restored
    at the end.
    """
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else []  # do not initialise an idle GPU
    with _ALONE, ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad())
        for kind in dict.fromkeys(("cpu", device.type)):
            if torch.is_autocast_enabled(kind):
                settings.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        # Orders and angles are drawn on the CPU. (torch 2.5 cannot tell its default device once that was set to None.)
        if torch.empty(0).device.type != "cpu":
            settings.enter_context(torch.device("cpu"))
        settings.enter_context(torch.random.fork_rng(devices))
        if device.type == "cuda":
            settings.enter_context(torch.cuda.stream(_stream(device)))
        settings.callback(random.setstate, random.getstate())
        settings.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
        settings.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        settings.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        settings.callback(torch.set_flush_denormal, _denormals_are_flushed())
        torch.set_flush_denormal(True)  # weights that L1 and L2 shrink become denormal numbers, slow on a CPU
        _use_exact_kernels(settings)
        yield


def _denormals_are_flushed() -> bool:
    return bool(torch.tensor(2.0**-120, dtype=torch.float32) * 2.0**-20 == 0)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which this process trains, since the default stream cannot be recorded.

    All runs share it, because torch keeps freed memory for the stream that used it.
    """
    return torch.cuda.Stream(device)


def _use_exact_kernels(settings: ExitStack) -> None:
    """Use cuDNN's deterministic kernels, and full float32 everywhere, until `settings` closes.

    torch has two interfaces to TF32. Both are set, since it refuses to read the older one where they disagree.
    """
    cudnn, mkldnn, newer = torch.backends.cudnn, cast(Any, torch.backends.mkldnn), []
    if hasattr(cudnn, "conv"):
        newer = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul]
    for operation in newer:
        settings.callback(setattr, operation, "fp32_precision", operation.fp32_precision)
    for name, value in (("benchmark", False), ("deterministic", True), ("allow_tf32", False)):
        with suppress(RuntimeError):  # a caller who has used both cannot read the older one
            settings.callback(setattr, cudnn, name, getattr(cudnn, name))
            setattr(cudnn, name, value)
    for operation in newer:
        operation.fp32_precision = "ieee"
    settings.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("highest")


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
    """Describe a start for run.json: device, processor, library versions, host, process, commit, and time in UTC."""
    cpu, core = _cpu()
    return {
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "core": core,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "host": platform.node(),
        "process": os.getpid(),
        "commit": _commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu() -> tuple[str, str]:
    """The CPU's name and instruction set; and its family, model, stepping and caches.

    Processors of the same name have given different last digits.
    """
    path = Path("/proc/cpuinfo")  # only on Linux
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    entries = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    names = {"vendor_id": "", "cpu family": "family ", "model": "model ", "stepping": "stepping "}
    words = [f"{word}{entries[name]}" for name, word in names.items() if name in entries]
    for place in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with suppress(OSError):
            level, kind, size = ((place / name).read_text().strip() for name in ("level", "type", "size"))
            words.append(f"L{level} {kind.lower()} {size}")
    name = entries.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})", ", ".join(words) or platform.machine()


@cache
def _commit() -> str | None:
    """The commit of the clone that holds s6lib, "with changes" if its files differ; None if it is in no clone."""
    clone = Path(__file__).parents[2]
    if not (clone / ".git").exists():
        return None
    command = ["git", "--no-optional-locks"]  # which leaves the index alone: others may be at work there
    command += ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with changes"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, cwd=clone, stderr=subprocess.DEVNULL, text=True, timeout=5).strip()
    return None
