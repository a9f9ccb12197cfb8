"""What the kernels of the stand-in for a card compute: the CPU does, in the card's memory, which lies on the host."""

import ctypes
import warnings

import torch
from torch.utils._pytree import tree_map

# These only look at shapes and memory, or are copies and reads that wait as the genuine ones do.
GENUINE = ("as_strided", "view", "_reshape_alias", "unfold", "alias", "set_", "_local_scalar_dense", "record_stream",
           "is_set_to", "resize", "empty", "copy_", "_efficientzerotensor")
ABSENT = ("cudnn", "_cudnn", "miopen", "_nested", "_fft", "_sparse", "_flash", "_efficient", "_scaled_dot", "_cslt",
          "_thnn_fused")
COMPILED_LATE = ("erfinv", "erfinv_", "erfinv.out", "special_entr", "special_entr.out")  # by NVRTC at their first call
WAITING = {"equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
INDEXED = {"index", "index_put_", "_index_put_impl_"}  # where a boolean index may wait
MIXED = ("index", "_index", "_fused_adam", "_foreach_copy_")  # take tensors of the CPU beside those of the card

kept = []  # what torch would forget


def waits(what):
    """Do what torch does where Python waits for the card."""
    mode = torch.cuda.get_sync_debug_mode()
    if mode == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    if mode == 1:
        warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=2)


def on_host(x):
    """Return a tensor of the CPU that lies in the same memory."""
    if not x.numel():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride()))
    memory = (ctypes.c_char * (size * x.element_size())).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, x.stride())


def on_card(x, like=None):
    """Return a copy on the card."""
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype if like is None else like.dtype,
                                device=torch.device("cuda", torch.cuda.current_device()))
    on_host(there).copy_(x)
    return there


def kernel_of(space, name):
    """Return what computes an operation of tensors of the card, or None for an unknown name."""
    base, _, overload = name.partition(".")
    try:
        packet = getattr(getattr(torch.ops, space), base)
        operation = getattr(packet, overload or "default")
    except AttributeError:
        return None

    def kernel(*args, **kwargs):
        LIBRARY.card_kernel()
        given, cards, others = {}, [], []

        def to_host(x):
            if isinstance(x, torch.Tensor) and x.is_cuda:
                here = on_host(x.detach())
                given[id(here)] = here, x
                cards.append(x)
                return here
            if isinstance(x, torch.Tensor) and x.dim():
                others.append(x)
            return {torch.device: torch.device("cpu"), torch.Generator: None}.get(type(x), x)

        there = tree_map(to_host, (args, kwargs))
        if cards and others and not base.startswith(MIXED):
            raise RuntimeError(f"Expected all tensors to be on the same device: {base} got {others[0].shape} of CPU")
        masks = base in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        filled = base != "index" and masks and args[2].numel() == 1  # by one value, which needs no count of places
        if base in WAITING or others and base in INDEXED or masks and not filled:
            waits(base)
        try:
            found = operation(*there[0], **there[1])
        except RuntimeError as error:
            if "Expected a value of type 'Tensor'" not in str(error):  # a number that the C++ side made a tensor
                raise
            found = packet(*there[0], **there[1])

        def to_card(x):
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) not in given:
                return on_card(x)
            here, original = given[id(x)]
            if here.shape != original.shape:  # an output that the operation resized
                original.resize_(here.shape)
                on_host(original).copy_(here)
            return original

        return tree_map(to_card, found)

    return kernel


def copy_(self, source, non_blocking=False):
    """Copy within the card; the genuine operation copies from and to the host."""
    if self.is_cuda and source.is_cuda:
        LIBRARY.card_kernel()
        on_host(self.detach()).copy_(on_host(source.detach()))
    else:
        GENUINE_COPY.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), self, source, non_blocking)
    return self


def attention(q, k, v, bias, compute_log_sumexp, dropout=0.0, is_causal=False, *, scale=None):
    """Compute attention in float32, as fused kernels accumulate."""
    LIBRARY.card_kernel()
    q_, k_, v_, bias_ = (x if x is None else on_host(x.detach()).float() for x in (q, k, v, bias))
    out = torch.nn.functional.scaled_dot_product_attention(q_, k_, v_, bias_, scale=scale)
    sums = torch.empty(*q.shape[:2], -(-q.shape[2] // 32) * 32, device=q.device)
    seeds = torch.empty((), dtype=torch.long), torch.empty((), dtype=torch.long)
    return on_card(out.transpose(1, 2).contiguous(), like=q).transpose(1, 2), sums, *seeds


def attention_backward(gradient, q, k, v, bias, out, sums, seed, offset, dropout, wanted, causal=False, *, scale=None):
    """Compute the gradients of attention in float32."""
    LIBRARY.card_kernel()
    g, q_, k_, v_ = (on_host(x.detach()).float() for x in (gradient, q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q_ @ k_.mT * scale
    if bias is not None:
        scores += on_host(bias.detach()).float()
    weights = scores.softmax(-1)
    by_weight = g @ v_.mT
    by_score = weights * (by_weight - (by_weight * weights).sum(-1, keepdim=True))
    found = by_score @ k_ * scale, by_score.mT @ q_ * scale, weights.mT @ g
    return *(on_card(x, like=q) for x in found), None if bias is None else on_card(by_score, like=bias)


def install(idle):
    """Register the kernels; idle: only those that torch would compile at their first call."""
    global LIBRARY, GENUINE_COPY
    LIBRARY = ctypes.CDLL(None)  # card.c, which is preloaded
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    names = [f"aten::{name}" for name in COMPILED_LATE]
    if not idle:
        torch.backends.cuda.enable_flash_sdp(False)
        names = {*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), "aten::convolution",
                 "aten::convolution_backward"}
        names = sorted(name for name in names if name.startswith(("aten::", "torchvision::"))
                       and not name.split("::")[1].startswith((*GENUINE, *ABSENT)))
    GENUINE_COPY = torch.library.get_kernel("aten::copy_", "CUDA")
    libraries = {space: torch.library.Library(space, "IMPL") for space in ("aten", "torchvision")}
    kept.append(libraries)
    kernels = {name: kernel_of(*name.split("::")) for name in names}
    if not idle:
        kernels |= {"aten::copy_": copy_, "aten::_scaled_dot_product_efficient_attention": attention,
                    "aten::_scaled_dot_product_efficient_attention_backward": attention_backward}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that each of them is replaced
        for name, kernel in kernels.items():
            if kernel:
                libraries[name.split("::")[0]].impl(name.split("::")[1], kernel, "CUDA", allow_override=True)
