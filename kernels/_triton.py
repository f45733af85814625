"""Triton where it is installed: the package works without it, on plain torch."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

if TYPE_CHECKING:
    from .apart import Matrices

__all__ = ["EXACT", "FLOATS", "INTERPRETED", "by_kernel", "capability", "cdiv", "check", "define",
           "jit", "launch", "signed32", "tensor_cores", "tl", "use_triton"]

_LOG = logging.getLogger(__name__)
# A context that does nothing.
_HERE = contextlib.nullcontext()

#: What kernels read and write.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Types without a __torch_function__ or __torch_dispatch__ of their own.
_PLAIN = (Tensor, torch.nn.Parameter)

triton: Any
tl: Any
try:
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
except ImportError:
    triton = tl = None


def jit(fn: Callable[..., Any]) -> Any:
    """triton.jit; without Triton the function as it is, which nothing then calls.

    Arguments **named** start, seed, parameter, step or stream are not specialized on: they change
    with every step and parameter. Give a new counter one of these names, or the kernel is compiled
    again when it first is 1, a multiple of 16, or neither.
    """
    if triton is None:
        return fn
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    volatile = [n for n in names if n in ("start", "seed", "parameter", "step", "stream")]
    return triton.jit(fn, do_not_specialize=volatile)


@jit
def _probe() -> None:
    pass


#: Under TRITON_INTERPRET=1 kernels run on CPU tensors.
INTERPRETED = triton is not None and not isinstance(_probe, triton.JITFunction)
#: Whether div_rn and sqrt_rn are exact: older versions of Triton flush subnormal numbers to zero.
EXACT = triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)

# Compute capability of GPUs by device. From 8.0 on, A100's, Triton promises to support them. For
# those of 7.5, such as a T4, it compiles too, but no products on tensor cores
# (triton-lang/triton#5066).
_CAPABILITY: dict[torch.device, tuple[int, int]] = {}
_OLDEST, _PROMISED = (7, 5), (8, 0)
# What a trial of the kernels found on GPUs of which Triton promises nothing, and which of them the
# thread that holds the lock is trying.
_TRIALS: dict[torch.device, str] = {}
_TRYING: set[torch.device] = set()
_LOCK = threading.RLock()


def capability(device: torch.device) -> tuple[int, int]:
    """Major and minor number of a CUDA device's architecture, (9, 0) of an H100."""
    # Not by functools.lru_cache, of which torch.compile warns.
    found = _CAPABILITY.get(device)
    if found is None:
        properties = torch.cuda.get_device_properties(device)
        found = _CAPABILITY[device] = (properties.major, properties.minor)
    return found


def _hindrance(device: torch.device) -> str:
    """Why kernels cannot run there; "" where they can."""
    if triton is None:
        return "triton is not installed"
    if INTERPRETED and device.type in ("cpu", "cuda"):
        return ""
    if device.type != "cuda":
        return "it needs a CUDA device, or TRITON_INTERPRET=1 and a CPU one"
    if torch.version.hip is not None:  # whose devices are called "cuda" too
        return "the kernels are for NVIDIA's GPUs"
    if not EXACT:
        return f"triton {triton.__version__} flushes subnormals, it must be >= 3.6"
    architecture = capability(device)
    if architecture < _OLDEST:
        return "its compute capability is {}.{}, it must be >= {}.{}".format(
            *architecture, *_OLDEST)
    return _driver() or ("" if architecture >= _PROMISED else _trial(device))


def _trial(device: torch.device) -> str:
    """What is wrong with the kernels there, which are tried once; "" for nothing."""
    found = _TRIALS.get(device)
    if found is not None:
        return found
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "its kernels have not been tried yet: take a step that is not recorded"
    with _LOCK:
        if device in _TRYING:  # the trial itself asks
            return ""
        _TRYING.add(device)
        try:
            found = _TRIALS.get(device)  # another thread may have tried
            if found is None:
                found = importlib.import_module(".trial", __package__).fault(device)
            _TRIALS[device] = found
        finally:
            _TRYING.discard(device)
    return found


def tensor_cores(device: torch.device) -> bool:
    """Whether Triton's products run on tensor cores there; on a CPU they are as those that do."""
    return device.type != "cuda" or INTERPRETED or capability(device) >= _PROMISED


# Why Triton cannot launch, once it was tried.
_DRIVER: list[str] = []


def _driver() -> str:
    """Why Triton's driver does not load, which it compiles when it is first used; "" if it does."""
    if not _DRIVER:
        if torch.compiler.is_compiling():  # which cannot trace it
            return "triton's driver has not been loaded yet: take a step that is not compiled"
        try:
            triton.runtime.driver.active.utils  # noqa: B018
            _DRIVER.append("")
        except Exception as error:  # no compiler, no headers of Python, or what it says of them
            _DRIVER.append(f"triton's driver does not load ({error}): it needs a C compiler and "
                           "the headers of Python")
            _LOG.warning("%s; torch does the work of the kernels", _DRIVER[0])
    return _DRIVER[0]


def use_triton(backend: str | None, device: torch.device) -> bool:
    """Whether to launch the kernel: by default on NVIDIA's GPUs from compute capability 7.5 on,
    where Triton >= 3.6 is installed.

    Args:
        backend: "triton", "torch", or None to choose.
        device: of the tensors.

    Raises:
        ValueError: no such backend.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    if backend is None and device.type != "cuda":
        return False
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend: expected None, 'torch' or 'triton', got {backend!r}")
    hindrance = "" if backend == "torch" else _hindrance(device)
    if backend == "triton" and hindrance:
        raise RuntimeError(f"backend: 'triton' cannot run on {device}: {hindrance}")
    return backend != "torch" and not hindrance


def by_kernel(x: Matrices) -> bool:
    """Whether kernels do the arithmetic on x; not under torch.compile, which would recompile for
    each rate.
    """
    return not torch.compiler.is_compiling() and use_triton(None, x.device)


# Compiled kernels and the values of their constants. The key has all that Triton specializes on:
# kernel, device, constants, and for each argument its type and what `launch` finds of its value.
_COMPILED: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def launch(kernel: Any, programs: int | tuple[int, int], device: torch.device, *args: Any,
           **constants: Any) -> None:
    """Run a kernel on the device of its tensors, which need not be the current one.

    Products and sums are not fused but where a kernel says so (``tl.fma``), whatever the version of
    Triton does by default. The cache of compiled kernels here is ten microseconds faster than
    Triton's own.

    Args:
        kernel: it.
        programs: how many, in one dimension or two.
        device: of the tensors.
        args: the kernel's arguments in order: tensors, None or numbers.
        constants: the rest of them, which are compiled in, and options of the compiler.
    """
    grid = (*programs, 1) if isinstance(programs, tuple) else (programs, 1, 1)
    # Entering a device costs as much as a small view, and it is nearly always the current one.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else _HERE:
        if INTERPRETED:
            kernel[grid](*args, **constants)
            return
        key = (kernel, device.index, *constants.values(), *[
            # Triton specializes on the value 1, on multiples of 16 and on aligned pointers.
            ("1" if x == 1 else x % 16 == 0, -(2**31) <= x < 2**31) if type(x) is int else
            (x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else
            float if isinstance(x, float) else (type(x), x) for x in args])
        found = _COMPILED.get(key)
        if found is None:
            compiled = kernel[grid](*args, **constants, enable_fp_fusion=False)
            if compiled is not None:  # None where a hook of Triton's has compiled it elsewhere
                rest = [constants.get(p.name, p.default) for p in kernel.params[len(args):]]
                _COMPILED[key] = compiled, rest
        else:
            compiled, rest = found
            compiled[grid](*args, *rest)


def define(schema: str, run: Callable[..., None]) -> Callable[..., None]:
    """Make an operator of torch.ops.lissom that writes into its arguments and returns nothing.

    torch.compile then passes through it, knowing what it changes. (torch.library.custom_op does
    the same in fewer lines, at 30 us per call instead of 3 to 8.) Where nothing needs to see an
    operator, ``run`` is called directly.

    Args:
        schema: such as ``"negate(Tensor x, Tensor(a!) out) -> ()"``.
        run: what it does.

    Returns:
        A function of the operator's arguments, the first of them a tensor.
    """
    name = "lissom::" + schema.partition("(")[0]
    torch.library.define(name, schema.removeprefix(schema.partition("(")[0]))
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    torch.library.register_fake(name, lambda *args: None)
    packet = getattr(torch.ops.lissom, name.removeprefix("lissom::"))
    op: Callable[..., None] = packet.default

    def call(x: Tensor, *args: Any) -> None:
        if _observed(x):
            op(x, *args)
        else:
            run(x, *args)

    return call


def _observed(x: Tensor) -> bool:
    """Whether anything must see this call as an operator: autograd, a tracer, a mode, the profiler,
    a tensor subclass, meta tensors, a default device. If not, the function is called directly,
    which is faster.
    """
    return (torch.is_grad_enabled() or type(x) not in _PLAIN
            or x.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling()
            or _get_current_dispatch_mode() is not None or _get_current_function_mode() is not None
            or torch.autograd.profiler._is_profiler_enabled)


def cdiv(a: int, b: int) -> int:
    """Division rounded up."""
    return -(-a // b)


def signed32(word: int) -> int:
    """The low 32 bits as int32, so that a kernel's argument has one type for all values."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def check(name: str, x: Matrices, *, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...],
          device: torch.device) -> None:
    """Raise if x is not a contiguous tensor of this shape and device, of one of the dtypes.

    Raises:
        ValueError: shape, layout or device; the message gives expected and received.
        TypeError: dtype.
    """
    if (x.shape == shape and x.dtype in dtypes and x.device == device and x.is_contiguous()):
        return
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise TypeError(f"{name}: expected {expected}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")
