"""Spiking networks for N-MNIST: neurons over whole sequences, `SpikingCNN`, `SpikingResNet`, their activity.

A network maps frames [T, B, 2, 34, 34] to the output neurons' `(spk, mem)`, both [T, B, 10]. Its layers run one
after the other, each over the whole sequence, so that a convolution sees T * B frames at once.

Neurons and pooling have two backends, equal in what they compute: `step` calls snnTorch's neurons T times and
torch's pooling, `fused` runs functions compiled by `torch.compile`, for any number of steps and recordings.
"""

import functools
import sys

import snntorch as snn
import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from snntorch import surrogate
from snntorch.utils import reset
from torch import distributed, nn
from torch.utils.dlpack import to_dlpack

NUM_DIGITS = 10
SURROGATE_SLOPE = 5  # of the fast sigmoid; snnTorch's default of 25 lets little gradient reach the first layer
BACKENDS = ("fused", "step")

# ---------------------------------------------------------------------------------------------------------
# Compiled functions
# ---------------------------------------------------------------------------------------------------------


if torch._inductor.config.cpp.vec_isa_ok is None:
    # What the processor says it can do is enough: trying each instruction set takes a first start seven seconds.
    torch._inductor.config.cpp.vec_isa_ok = True
# A function has a few variants: float32 and bfloat16, a block and a step, with synapse and adaptation or without.
torch._dynamo.config.recompile_limit = 64


class Kernel:
    """A function of tensors that `torch.compile` compiles once for all shapes.

    Where no compiler works, it runs as it is, which is said once; `Kernel.compiler_error` then says why.
    """

    compiler_error: str | None = None

    def __init__(self, function):
        self.function = function
        self.compiled = torch.compile(function, dynamic=True, fullgraph=True)

    def __call__(self, *args):
        empty = any(isinstance(x, torch.Tensor) and x.numel() == 0 for x in args)  # not worth a variant of its own
        if Kernel.compiler_error is None and not empty:
            try:
                return self.compiled(*args)
            except Exception as error:  # compilers fail in many ways; an error of the function itself comes again below
                Kernel.compiler_error = next(iter(str(error).splitlines()), type(error).__name__)
                print(f"WARNING: neurons run uncompiled, and slower: {Kernel.compiler_error}", file=sys.stderr)
        return self.function(*args)


def bare(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return the same memory as a tensor that is no view and has no gradient, for which a function compiles anew."""
    return None if x is None else torch.from_dlpack(to_dlpack(x.detach()))


def describe_backend(network: "SpikingNetwork") -> str:
    """Return how the neurons of `network` run: 'fused', 'fused, uncompiled' or 'step'."""
    uncompiled = network.neuron_backend == "fused" and Kernel.compiler_error
    return network.neuron_backend + (", uncompiled" if uncompiled else "")


# ---------------------------------------------------------------------------------------------------------
# Fused neurons
# ---------------------------------------------------------------------------------------------------------

# Steps that a neuron's function computes in a call. Between them its state stays in registers; a function over all T
# steps would be compiled anew for each T.
BLOCK = 5


@Kernel
def run_forward(cur, spks, mems, adaptations, state, beta, threshold, alpha, rho, kappa):
    """Run neurons over the steps of cur [steps, N], and fill the lists `spks`, `mems`, `adaptations` of rows [N].

    `state` is what the step before left: (mem, spk, syn, adaptation), float32 [N]. Where `kappa` is None, there is
    neither synapse nor adaptation. Returns the new state.
    """
    mem, spk, syn, adaptation = state
    limit = threshold if kappa is None else threshold + kappa * adaptation  # what the last spike crossed
    for t in range(len(spks)):
        current = cur[t].float()
        if kappa is not None:
            syn = current = alpha * syn + current
        mem = beta * mem + current - spk * limit
        if kappa is not None:
            adaptation = rho * adaptation + (1 - rho) * spk
            limit = threshold + kappa * adaptation
            adaptations[t].copy_(adaptation)
        spk = (mem > limit).float()
        spks[t].copy_(spk)
        mems[t].copy_(mem)
    return mem, spk, syn, adaptation


@Kernel
def run_backward(
    grad_cur,
    grad_spks,
    grad_mems,
    mem_share,
    spks,
    mems,
    adaptations,
    before,
    state,
    sums,
    beta,
    threshold,
    alpha,
    rho,
    kappa,
):
    """Run the gradients back over a few steps, and fill the list `grad_cur` of rows [N], in the order of time.

    `grad_mems` count `mem_share` times: 0 where no gradient reaches the membranes. `spks`, `mems` and `adaptations`
    [steps, N] are those of the forward pass, `before` the membranes a step earlier: there where `sums` are wanted, the
    gradients [N] of (beta, threshold) so far. `state` holds those of (mem, syn, adaptation) a step later. Returns new
    state and sums. The spikes of the reset carry no gradient; the thresholds that it subtracts do, as in snnTorch.
    """
    grad_mem, grad_syn, grad_adaptation = state
    for t in reversed(range(len(grad_cur))):
        grad_spk = grad_spks[t].float()
        limit = threshold
        if kappa is not None:
            grad_spk = grad_spk + (1 - rho) * grad_adaptation
            limit = threshold + kappa * adaptations[t].float()
        grad_fire = grad_spk / (1 + SURROGATE_SLOPE * (mems[t].float() - limit).abs()) ** 2  # snnTorch's fast_sigmoid
        grad_limit = -grad_fire - spks[t].float() * grad_mem
        grad_mem = beta * grad_mem + grad_fire
        grad_mem = grad_mem + mem_share * grad_mems[t].float()
        if sums is not None:
            sums = (sums[0] + grad_mem * before[t].float(), sums[1] + grad_limit)
        if kappa is None:
            grad_cur[t].copy_(grad_mem)
        else:
            grad_adaptation = rho * grad_adaptation + kappa * grad_limit
            grad_syn = alpha * grad_syn + grad_mem
            grad_cur[t].copy_(grad_syn)
    return (grad_mem, grad_syn, grad_adaptation), sums


def blocks(time_steps: int) -> list[slice]:
    """Cut the steps into blocks of `BLOCK`, and single steps for what is left: two lengths to compile for all T."""
    whole = time_steps - time_steps % BLOCK
    return [slice(t, t + BLOCK) for t in range(0, whole, BLOCK)] + [slice(t, t + 1) for t in range(whole, time_steps)]


def rows(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the steps of x [steps, N] as a list of rows [N], which compiled functions write straight into."""
    return [bare(row) for row in x]


def rest(x: torch.Tensor) -> torch.Tensor:
    """Return the state [N] of neurons before the first step of x [T, N], or of gradients after the last."""
    return torch.zeros(x.shape[1], device=x.device)


class FusedNeuron(torch.autograd.Function):
    """Neurons over a whole sequence: cur [T, N] -> (spk, mem), both [T, N], the equations of `Leaky`, or of all three.

    I_syn[t] = alpha I_syn[t-1] + I[t],
    a[t] = rho a[t-1] + (1 - rho) S[t-1],    threshold[t] = threshold + kappa a[t],
    U[t] = beta U[t-1] + I_syn[t] - S[t-1] threshold[t-1],    S[t] = (U[t] > threshold[t]).

    `Synaptic` has kappa = 0, `ALIF` alpha = 0; for `Leaky` alpha, rho and kappa are None. What is kept between steps is
    float32, whatever the type of `cur`. Gradients reach `cur`, `beta` and `threshold`.
    """

    @staticmethod
    def forward(ctx, cur, beta, threshold, alpha, rho, kappa):
        ctx.set_materialize_grads(False)
        constants = [bare(x) for x in (beta, threshold, alpha, rho, kappa)]
        spk, mem = torch.empty_like(cur), torch.empty_like(cur)
        adaptation = None if kappa is None else torch.empty_like(cur)
        state = (rest(cur), rest(cur)) + ((None, None) if kappa is None else (rest(cur), rest(cur)))
        for block in blocks(len(cur)):
            filled = (None if x is None else rows(x[block]) for x in (spk, mem, adaptation))
            state = run_forward(bare(cur[block]), *filled, state, *constants)
        ctx.save_for_backward(spk, mem, adaptation, *constants)
        return spk, mem

    @staticmethod
    def backward(ctx, grad_spk, grad_mem):
        spk, mem, adaptation, *constants = ctx.saved_tensors
        grad_spk = torch.zeros_like(spk) if grad_spk is None else grad_spk.contiguous()
        # Any numbers in place of gradients that are none, and a share of 0: not another function to compile.
        mem_share = torch.tensor(0.0 if grad_mem is None else 1.0, device=spk.device)
        grad_mem = grad_spk if grad_mem is None else grad_mem.contiguous()
        grad_cur = torch.empty_like(spk)
        state = (rest(spk),) + ((None, None) if adaptation is None else (rest(spk), rest(spk)))
        sums = (rest(spk), rest(spk)) if any(ctx.needs_input_grad[1:3]) else None
        before = None if sums is None else torch.cat([torch.zeros_like(mem[:1]), mem[:-1]])
        for block in reversed(blocks(len(spk))):
            grads = bare(grad_spk[block]), bare(grad_mem[block]), bare(mem_share)
            given = (None if x is None else bare(x[block]) for x in (spk, mem, adaptation, before))
            state, sums = run_backward(rows(grad_cur[block]), *grads, *given, state, sums, *constants)
        grad_beta, grad_threshold = (None, None) if sums is None else (x.sum() for x in sums)
        return grad_cur, grad_beta, grad_threshold, None, None, None


# ---------------------------------------------------------------------------------------------------------
# Fused pooling
# ---------------------------------------------------------------------------------------------------------


@Kernel
def run_pool(x, pooled, places):
    """Put into `pooled` the largest of each 2 x 2 window of x [N, 2, w, 2, C], into `places` its place there, 0 to 3.

    N pairs of rows, not frames: so no index is divided, which takes longer than the maximum.
    """
    # In float32, since bfloat16 of fewer than 32 channels is not vectorized.
    first, second, third, fourth = (x[:, i, :, j].float() for i in (0, 1) for j in (0, 1))
    largest = torch.maximum(torch.maximum(first, second), torch.maximum(third, fourth))
    # Of equals the first, as in torch's pooling.
    place = torch.where(second == largest, 1.0, torch.where(third == largest, 2.0, 3.0))
    pooled.copy_(largest)
    places.copy_(torch.where(first == largest, 0.0, place))


def pool(x: torch.Tensor, pooled: torch.Tensor, place: torch.Tensor) -> None:
    """Run `run_pool` over x [F, 2h, 2w, C] into `pooled` and `place` [F, h, w, C], all contiguous."""
    windows = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).flatten(0, 1)
    run_pool(bare(windows), bare(pooled.flatten(0, 1)), bare(place.flatten(0, 1)))


def at_place(grad, place, places):
    """Return `grad` [F, h, w, C] at its place in windows [F, h, 2, w, 2, C] of zeros; `places` numbers those of one."""
    here = place[:, :, None, :, None].float() == places
    return torch.where(here, grad[:, :, None, :, None].float(), 0.0)


@Kernel
def run_unpool(grad, place, places):
    """Return `at_place`, of the type of `grad`."""
    return at_place(grad, place, places).to(grad.dtype)


@Kernel
def run_add_unpooled(x, grad, place, places):
    """Add `at_place` to the windows x [F, h, 2, w, 2, C]."""
    x.copy_(x.float() + at_place(grad, place, places))


def unpool(grad: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return the gradients [F, 2h, 2w, C] of what was pooled, from those of the largest [F, h, w, C] at `place`."""
    return run_unpool(bare(grad), bare(place), places_of(place)).flatten(3, 4).flatten(1, 2)


def places_of(place: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the places in a window as [2, 1, 2, 1], on the device of `place`."""
    return bare(torch.arange(4.0, device=place.device).view(2, 1, 2, 1))


class FusedMaxPool(torch.autograd.Function):
    """The largest of each 2 x 2 window: x [F, C, H, W] -> x, [F, C, H // 2, W // 2], all channels_last.

    Equal to torch's, values and gradients, but torch's takes a CPU longer than the convolution before it. What else
    reads x is to read the x that is returned: so both gradients meet here, and the one is added into the other.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        even = x.movedim(1, -1)[:, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]  # an odd last row is in no window
        even = even.contiguous()
        pooled = x.new_empty((len(x), x.shape[2] // 2, x.shape[3] // 2, x.shape[1]))
        place = torch.empty_like(pooled, dtype=torch.uint8)
        pool(even, pooled, place)
        ctx.save_for_backward(place)
        ctx.shape = x.movedim(1, -1).shape
        return x.view_as(x), pooled.movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad_x, grad):
        (place,) = ctx.saved_tensors
        grad_x = grad.new_zeros(ctx.shape) if grad_x is None else grad_x.movedim(1, -1).contiguous()
        h, w = place.shape[1:3]
        windows = grad_x[:, : 2 * h, : 2 * w].unflatten(2, (w, 2)).unflatten(1, (h, 2))
        run_add_unpooled(bare(windows), bare(grad.movedim(1, -1).contiguous()), bare(place), places_of(place))
        return grad_x.movedim(-1, 1)


class FusedConvPool(torch.autograd.Function):
    """Convolution (3 x 3, padded by 1) and `FusedMaxPool`: x [F, C, H, H] -> [F, D, H // 2, H // 2], channels_last.

    What the convolution gives is never there for all frames at once: on a CPU it goes through the cache, part by part.
    """

    CACHED = 16_000_000  # bytes of a part

    @staticmethod
    def parts(x: torch.Tensor, weight: torch.Tensor) -> list[slice]:
        """Cut the frames of x into parts whose convolution fits into a CPU's cache."""
        size = x.shape[2] * x.shape[3] * len(weight) * x.element_size()
        frames = max(1, FusedConvPool.CACHED // size if x.device.type == "cpu" else len(x))
        return [slice(first, first + frames) for first in range(0, len(x), frames)]

    @staticmethod
    def frame(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return x as the convolution is to see it, and what is left for it to pad."""
        if x.shape[2] % 2 == 0:
            return x, 1
        # The convolution's last row and column are in no window: without padding there, they are not computed.
        return F.pad(x, (1, 0, 1, 0)), 0

    @staticmethod
    def forward(ctx, x, weight):
        shape = (len(x), x.shape[2] // 2, x.shape[3] // 2, len(weight))
        pooled = x.new_empty(shape)
        place = torch.empty(shape, dtype=torch.uint8, device=x.device)
        for part in FusedConvPool.parts(x, weight):
            seen, padding = FusedConvPool.frame(x[part])
            conv = F.conv2d(seen, weight, padding=padding)
            pool(conv.movedim(1, -1), pooled[part], place[part])
        ctx.save_for_backward(x, weight, place)
        return pooled.movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, place = ctx.saved_tensors
        grad = grad.movedim(1, -1).contiguous()
        needed = [ctx.needs_input_grad[0], True, False]
        grad_x = torch.empty_like(x) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in FusedConvPool.parts(x, weight):
            seen, padding = FusedConvPool.frame(x[part])
            grad_conv = unpool(grad[part], place[part]).movedim(-1, 1)
            grads = torch.ops.aten.convolution_backward(
                grad_conv, seen, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, needed
            )
            if needed[0]:
                grad_x[part] = grads[0] if padding else grads[0][:, :, 1:, 1:]
            grad_weight += grads[1]
        return grad_x, grad_weight.to(weight.dtype)


class MaxPool(nn.Module):
    """Max pooling over windows of 2 x 2: x [F, C, H, W] -> x, [F, C, H // 2, W // 2].

    x comes back for what reads it, too: it costs less than to add up its gradients afterwards.
    """

    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def forward(self, x):
        return FusedMaxPool.apply(x) if self.backend == "fused" else (x, F.max_pool2d(x, 2))


class ConvPool(nn.Conv2d):
    """Convolution (3 x 3, padded by 1, no bias) and max pooling (2 x 2): x [F, C, H, W] -> [F, D, H // 2, W // 2]."""

    def __init__(self, in_channels: int, out_channels: int, backend: str):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.backend = backend

    def forward(self, x):
        if self.backend == "fused":
            return FusedConvPool.apply(x, self.weight.to(x.dtype))
        return F.max_pool2d(super().forward(x), 2)


# ---------------------------------------------------------------------------------------------------------
# Neurons
# ---------------------------------------------------------------------------------------------------------


# Pictures [T, B, C, H, W] lie in memory as [T, B, H, W, C] (channels_last), in which pooling and the gradients of
# convolutions take a fraction of the time on a CPU. The neurons see them in that order, so that no step copies.


def memory_order(x: torch.Tensor) -> torch.Tensor:
    """View pictures [T, B, C, H, W] as [T, B, H, W, C]; anything else as it is."""
    return x.movedim(2, -1) if x.dim() == 5 else x


def picture_order(x: torch.Tensor) -> torch.Tensor:
    """Undo `memory_order`."""
    return x.movedim(-1, 2) if x.dim() == 5 else x


def fuse_steps(cur: torch.Tensor, beta, threshold, alpha=None, rho=None, kappa=None):
    """Run `FusedNeuron` over cur [T, B, ...]; return (spk, mem) of the same shape."""
    ordered = memory_order(cur)
    outputs = FusedNeuron.apply(ordered.flatten(1).contiguous(), beta, threshold, alpha, rho, kappa)
    return tuple(picture_order(x.view(ordered.shape)) for x in outputs)


def stack_steps(steps: list[torch.Tensor]) -> torch.Tensor:
    """Stack steps in memory order along a new first dimension: the inverse of `memory_order` over all of them."""
    return picture_order(torch.stack(steps))


class Leaky(snn.Leaky):
    """`snntorch.Leaky` over a whole sequence: cur [T, B, ...] -> (spk, mem), both of the same shape.

    U[t] = beta U[t-1] + I[t] - S[t-1] threshold,    S[t] = (U[t] > threshold),    U = S = 0 before the start.
    """

    def __init__(self, beta, threshold=1.0, backend="fused", **options):
        super().__init__(beta, threshold, surrogate.fast_sigmoid(SURROGATE_SLOPE), **options)
        self.backend = backend

    def forward(self, cur):
        if self.backend == "fused":
            return fuse_steps(cur, self.beta.clamp(0, 1), self.threshold)
        cur = memory_order(cur)
        mem = torch.zeros_like(cur[0])
        spks, mems = [], []
        for step_cur in cur:
            spk, mem = super().forward(step_cur, mem)
            spks.append(spk)
            mems.append(mem)
        return stack_steps(spks), stack_steps(mems)


class Synaptic(snn.Synaptic):
    """`snntorch.Synaptic` over a whole sequence: cur [T, B, ...] -> (spk, mem), both of the same shape.

    I_syn[t] = alpha I_syn[t-1] + I[t],    U[t] = beta U[t-1] + I_syn[t] - S[t-1] threshold.
    """

    def __init__(self, alpha, beta, threshold=1.0, backend="fused", **options):
        super().__init__(alpha, beta, threshold, surrogate.fast_sigmoid(SURROGATE_SLOPE), **options)
        self.backend = backend

    def forward(self, cur):
        if self.backend == "fused":
            nothing = torch.zeros_like(self.beta)
            return fuse_steps(cur, self.beta.clamp(0, 1), self.threshold, self.alpha.clamp(0, 1), nothing, nothing)
        cur = memory_order(cur)
        syn = mem = torch.zeros_like(cur[0])
        spks, mems = [], []
        for step_cur in cur:
            spk, syn, mem = super().forward(step_cur, syn, mem)
            spks.append(spk)
            mems.append(mem)
        return stack_steps(spks), stack_steps(mems)


class ALIF(snn.SpikingNeuron):
    """Leaky integrate-and-fire with an adaptive threshold, over a whole sequence (snnTorch has no such neuron).

    a[t] = alpha a[t-1] + (1 - alpha) S[t-1],            threshold[t] = threshold + kappa a[t],
    U[t] = beta U[t-1] + I[t] - S[t-1] threshold[t-1],   S[t] = (U[t] > threshold[t]).

    The spikes of the reset carry no gradient, as in snnTorch; those of the adaptation do. With kappa = 0 it is `Leaky`.
    Source: Bellec et al. 2018, "Long short-term memory and learning-to-learn in networks of spiking neurons".
    """

    def __init__(self, alpha, beta, kappa, threshold=1.0, backend="fused", **options):
        super().__init__(threshold, surrogate.fast_sigmoid(SURROGATE_SLOPE), **options)
        self.register_buffer("alpha", torch.as_tensor(alpha))
        self.register_buffer("beta", torch.as_tensor(beta))
        self.register_buffer("kappa", torch.as_tensor(kappa))
        self.backend = backend

    def thresholds(self, spk):
        """Return the threshold of each step [T, ...] that spikes of the same shape bring about."""
        adaptation, thresholds = torch.zeros_like(spk[0]), [torch.full_like(spk[0], float(self.threshold))]
        for step_spk in spk[:-1]:
            adaptation = self.alpha * adaptation + (1 - self.alpha) * step_spk
            thresholds.append(self.threshold + self.kappa * adaptation)
        return torch.stack(thresholds)

    def forward(self, cur):
        if self.backend == "fused":
            return fuse_steps(cur, self.beta, self.threshold, torch.zeros_like(self.beta), self.alpha, self.kappa)
        cur = memory_order(cur)
        mem = spk = adaptation = torch.zeros_like(cur[0])
        threshold = self.threshold
        spks, mems = [], []
        for step_cur in cur:
            mem = self.beta * mem + step_cur - spk.detach() * threshold
            adaptation = self.alpha * adaptation + (1 - self.alpha) * spk
            threshold = self.threshold + self.kappa * adaptation
            spk = self.spike_grad(mem - threshold)
            spks.append(spk)
            mems.append(mem)
        return stack_steps(spks), stack_steps(mems)


# ---------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------


def over_steps(x: torch.Tensor, *layers: nn.Module) -> torch.Tensor:
    """Apply layers that know no time to all steps at once: [T, B, ...] -> [T * B, ...] -> [T, B, ...]."""
    out = x.flatten(0, 1)
    for layer in layers:
        out = layer(out)
    return out.unflatten(0, x.shape[:2])


def balance(decay: float) -> float:
    """Return by what to scale an input so that, summed up over steps with this `decay`, it stays of its size.

    The sum takes noise 1 / (1 - decay**2)**0.5 times, what lasts 1 / (1 - decay) times: this lies between the two.
    """
    return max(1 - decay, 0.01) ** 0.5


class SpikingNetwork(nn.Module):
    """What both networks share: their settings, their neurons, and how a pass starts.

    Subclasses define `currents`, and name every neuron layer as an attribute of their own, since
    `snntorch.utils.reset` looks for neurons among a network's direct children.
    """

    def __init__(self, beta: float, threshold: float, dropout: float, precision: str, neuron_backend: str):
        super().__init__()
        self.beta, self.threshold = beta, threshold
        self.precision, self.neuron_backend = precision, neuron_backend
        self.dropout = nn.Dropout(dropout)

    def _leaky(self) -> Leaky:
        return Leaky(self.beta, self.threshold, self.neuron_backend)

    def _current(self) -> float:
        """Return the standard deviation that the currents of LIF layers are to have at the start.

        One threshold keeps every layer firing, neither silent nor saturated (threshold-dependent normalisation, Zheng
        et al. 2021, "Going deeper with directly-trained larger SNNs"). Up to a beta of 0.5 membranes are of that size,
        too; above, currents are made smaller for it: far from the threshold little gradient passes.
        """
        return self.threshold * min(1.0, balance(self.beta) / balance(0.5))

    def _norm(self, norm: nn.Module, scale: float = 1.0) -> nn.Module:
        # A batch holds T frames of each recording, so its statistics are sure, and may count for more than torch's
        # tenth: with a tenth, the first epoch of a small data set ends with a silent network.
        norm.momentum = 0.2
        nn.init.constant_(norm.weight, self._current() * scale)
        return norm

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tensors between layers, and best of the frames."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def drop(self, spk: torch.Tensor) -> torch.Tensor:
        """Drop neurons of spk [T, B, N] in training: each for the whole recording, as its steps are of one neuron."""
        return spk * self.dropout(torch.ones_like(spk[0])) if self.training else spk

    def neuron_layers(self) -> dict[str, snn.SpikingNeuron]:
        """Return the neuron layers by name, in the order in which they run."""
        return {name: child for name, child in self.named_children() if isinstance(child, snn.SpikingNeuron)}

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map frames [T, B, 2, 34, 34] to (spk, mem) of the output neurons, both [T, B, 10]."""
        reset(self)  # clears the states that snnTorch's neurons keep of the batch before, and its graph
        frames = picture_order(memory_order(frames.to(self.dtype)).contiguous())
        with torch.autocast(frames.device.type, self.dtype, enabled=self.precision == "bf16"):
            spk, mem = self.lif_out(self.currents(frames))
        return spk.float(), mem.float()


class SpikingCNN(SpikingNetwork):
    """Three times conv -> max pool -> norm -> LIF, then fully connected -> LIF -> dropout, then output -> LIF.

    `alpha` is there for `build_model`'s sake: no neuron of this network has one.
    """

    def __init__(
        self,
        beta=0.5,
        threshold=1.0,
        alpha=0.9,
        dropout=0.2,
        precision="fp32",
        neuron_backend="fused",
        widths=(16, 32, 64),
        hidden=128,
    ):
        super().__init__(beta, threshold, dropout, precision, neuron_backend)
        w1, w2, w3 = widths
        self.conv1 = ConvPool(2, w1, neuron_backend)  # 34 x 34, pooled to 17 x 17
        self.norm1 = self._norm(nn.BatchNorm2d(w1))
        self.lif1 = self._leaky()
        self.conv2 = ConvPool(w1, w2, neuron_backend)  # 17 x 17, pooled to 8 x 8
        self.norm2 = self._norm(nn.BatchNorm2d(w2))
        self.lif2 = self._leaky()
        self.conv3 = ConvPool(w2, w3, neuron_backend)  # 8 x 8, pooled to 4 x 4
        self.norm3 = self._norm(nn.BatchNorm2d(w3))
        self.lif3 = self._leaky()
        self.fc1 = nn.Linear(w3 * 4 * 4, hidden, bias=False)
        self.norm4 = self._norm(nn.BatchNorm1d(hidden))
        self.lif4 = self._leaky()
        self.fc_out = nn.Linear(hidden, NUM_DIGITS, bias=False)
        self.norm_out = self._norm(nn.BatchNorm1d(NUM_DIGITS))
        self.lif_out = self._leaky()

    def currents(self, frames: torch.Tensor) -> torch.Tensor:
        """Map frames [T, B, 2, 34, 34] to the currents [T, B, 10] of the output neurons."""
        spk, _ = self.lif1(over_steps(frames, self.conv1, self.norm1))
        spk, _ = self.lif2(over_steps(spk, self.conv2, self.norm2))
        spk, _ = self.lif3(over_steps(spk, self.conv3, self.norm3))
        spk, _ = self.lif4(over_steps(memory_order(spk).flatten(2), self.fc1, self.norm4))
        return over_steps(self.drop(spk), self.fc_out, self.norm_out)


class SpikingResNet(SpikingNetwork):
    """conv -> ALIF, two residual blocks with LIF, fully connected -> synaptic LIF -> dropout, output -> LIF.

    A block halves the picture and doubles the width; its shortcut adds to the current of its second LIF.
    """

    ADAPTATION = 0.5  # kappa, in thresholds: how far the threshold of a neuron that always fires would rise

    def __init__(
        self,
        beta=0.5,
        threshold=1.0,
        alpha=0.9,
        dropout=0.2,
        precision="fp32",
        neuron_backend="fused",
        widths=(16, 32, 64),
        hidden=128,
    ):
        super().__init__(beta, threshold, dropout, precision, neuron_backend)
        w1, w2, w3 = widths
        self.conv1 = ConvPool(2, w1, neuron_backend)  # 34 x 34, pooled to 17 x 17
        self.norm1 = self._norm(nn.BatchNorm2d(w1))
        self.lif1 = ALIF(alpha, beta, self.ADAPTATION * threshold, threshold, neuron_backend)
        self.res1 = ResidualBlock(w1, w2, neuron_backend, self._norm, self._current())  # 17 x 17 to 8 x 8
        self.res1_lif1, self.res1_lif2 = self._leaky(), self._leaky()
        self.res2 = ResidualBlock(w2, w3, neuron_backend, self._norm, self._current())  # 8 x 8 to 4 x 4
        self.res2_lif1, self.res2_lif2 = self._leaky(), self._leaky()
        self.fc1 = nn.Linear(w3 * 4 * 4, hidden, bias=False)
        self.norm2 = self._norm(nn.BatchNorm1d(hidden), scale=balance(alpha))
        self.fc_syn = Synaptic(alpha, beta, threshold, neuron_backend)
        self.fc_out = nn.Linear(hidden, NUM_DIGITS, bias=False)
        self.norm_out = self._norm(nn.BatchNorm1d(NUM_DIGITS))
        self.lif_out = self._leaky()

    def currents(self, frames: torch.Tensor) -> torch.Tensor:
        """Map frames [T, B, 2, 34, 34] to the currents [T, B, 10] of the output neurons."""
        spk, _ = self.lif1(over_steps(frames, self.conv1, self.norm1))
        spk = self.res1(spk, self.res1_lif1, self.res1_lif2)
        spk = self.res2(spk, self.res2_lif1, self.res2_lif2)
        spk, _ = self.fc_syn(over_steps(memory_order(spk).flatten(2), self.fc1, self.norm2))
        return over_steps(self.drop(spk), self.fc_out, self.norm_out)


class ResidualBlock(nn.Module):
    """The layers of a residual block. Its two neuron layers belong to the network, which hands them over."""

    def __init__(self, width_in: int, width_out: int, neuron_backend: str, make_norm, current: float):
        super().__init__()
        self.conv1 = ConvPool(width_in, width_out, neuron_backend)
        self.norm1 = make_norm(nn.BatchNorm2d(width_out))
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = make_norm(nn.BatchNorm2d(width_out))
        self.pool = MaxPool(neuron_backend)
        self.shortcut = nn.Conv2d(width_in, width_out, 1, bias=False)
        # No norm measures the shortcut's current: it grows and shrinks with that of the norms beside it.
        with torch.no_grad():
            self.shortcut.weight *= current

    def forward(self, spk, lif1, lif2):
        """Map spikes [T, B, width_in, H, W] to spikes [T, B, width_out, H // 2, W // 2]."""
        spk, pooled = (x.unflatten(0, spk.shape[:2]) for x in self.pool(spk.flatten(0, 1)))
        shortcut = over_steps(pooled, self.shortcut)
        spk, _ = lif1(over_steps(spk, self.conv1, self.norm1))
        cur = over_steps(spk, self.conv2, self.norm2)
        spk, _ = lif2(cur + shortcut)
        return spk


NETWORKS = {"cnn": SpikingCNN, "resnet": SpikingResNet}


def build_model(
    model: str, beta: float, threshold: float, alpha: float, dropout: float, precision="fp32", neuron_backend="fused"
) -> SpikingNetwork:
    """Build the network called `model` ('cnn' or 'resnet'); weights are drawn from torch's global generator.

    `precision` is 'bf16' (bfloat16 autocast, membranes in float32) or 'fp32', `neuron_backend` 'fused' or 'step'.
    """
    network = NETWORKS[model](beta, threshold, alpha, dropout, precision, neuron_backend)
    return network.to(memory_format=torch.channels_last)


def load_network(checkpoint: dict, device: torch.device) -> SpikingNetwork:
    """Rebuild a checkpoint's network on `device`, with the settings it was trained with."""
    network = build_model(**checkpoint["network_settings"])
    network.load_state_dict(checkpoint["network"])
    return network.to(device)


def synchronize_norms(network: SpikingNetwork) -> None:
    """Let the norms of `network` measure the batch of all processes in training, as those of a single process would.

    torch's own `SyncBatchNorm` is for CUDA alone.
    """
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.forward = functools.partial(normalise_over_processes, norm)


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over processes; its gradient is that of all processes' losses, added up."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad)
        return grad


def normalise_over_processes(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Normalise x [F, C, ...] as `norm` does, in training by mean and variance over the frames of all processes."""
    if not norm.training:
        return type(norm).forward(norm, x)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
    values = x.float()
    sums = [values.sum(dims, dtype=torch.float64), (values * values).sum(dims, dtype=torch.float64), count]
    sums = SumOverProcesses.apply(torch.cat(sums))
    count = sums[-1].detach()
    mean, square = (sums[:-1] / count).chunk(2)
    variance = square - mean**2
    with torch.no_grad():
        norm.running_mean.lerp_(mean.float(), norm.momentum)
        norm.running_var.lerp_((variance * count / (count - 1)).float(), norm.momentum)
        norm.num_batches_tracked += 1
    scale = norm.weight * torch.rsqrt(variance + norm.eps).float()
    shift = norm.bias - mean.float() * scale
    along_channels = (1, -1) + (1,) * (x.dim() - 2)
    return (values * scale.view(along_channels) + shift.view(along_channels)).to(x.dtype)


def predict(mem: torch.Tensor) -> torch.Tensor:
    """Return the digit [B] whose output neuron has the largest membrane potential, summed over time: mem [T, B, 10].

    In the mean over time, U (1 - beta) = I - rate * threshold: where two neurons fire at the same rate, or none does,
    potentials still tell which has the larger current. Spike counts alone tie often, and decide worse.
    """
    return mem.sum(0).argmax(-1)


def predict_over_time(mem: torch.Tensor) -> torch.Tensor:
    """Return the decisions [T, B] after each of the T steps, each made as `predict` makes the last."""
    return mem.cumsum(0).argmax(-1)


# ---------------------------------------------------------------------------------------------------------
# Activity
# ---------------------------------------------------------------------------------------------------------


class LayerRecorder(dict):
    """Records the (spk, mem) of each neuron layer, by its name and in float32, while open as a context manager.

    It does so through forward hooks, and changes nothing in the network. Of several passes, the last stays.
    """

    def __init__(self, network: SpikingNetwork):
        super().__init__()
        self.network = network

    def __enter__(self):
        def record(name):
            return lambda _layer, _inputs, outputs: self.update({name: tuple(x.float() for x in outputs)})

        layers = self.network.neuron_layers()
        self._hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


class ActivityMeter:
    """Measures a network's activity through forward hooks while it is open as a context manager.

    - `firing_rate()`: spikes per neuron and step, by neuron layer.
    - `synaptic_operations()`: per recording, each spike times the fan-out of the neuron that fired, summed.
      Input events count as spikes of the sensor's pixels.
    - `macs()`: multiplications per recording of the same network without spikes, where every connection is used
      at every step: what `synaptic_operations` would be if every neuron fired at every step.

    Connections to the zero padding around a picture are no connections, and are not counted.
    """

    def __init__(self, network: SpikingNetwork):
        self.network = network
        self.recordings = self.steps = 0
        self._spikes: dict[str, float] = {name: 0.0 for name in network.neuron_layers()}
        self._neurons: dict[str, int] = {}
        self._operations = 0.0
        self._connections: dict[nn.Module, int] = {}
        self._fan_outs: dict[nn.Module, torch.Tensor] = {}

    def __enter__(self):
        self._hooks = [self.network.register_forward_pre_hook(self._count_recordings)]
        for name, layer in self.network.neuron_layers().items():
            self._hooks.append(layer.register_forward_hook(self._spike_counter(name)))
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                self._hooks.append(module.register_forward_pre_hook(self._count_operations))
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _count_recordings(self, _network, inputs):
        self.steps = inputs[0].shape[0]
        self.recordings += inputs[0].shape[1]

    def _spike_counter(self, name):
        def count(_layer, _inputs, outputs):
            spk = outputs[0].detach()
            # Over time and batch first: float32 counts exactly to 2^24, a whole layer's spikes may be more.
            self._spikes[name] += float(spk.sum((0, 1), dtype=torch.float32).sum(dtype=torch.float64))
            self._neurons[name] = spk[0, 0].numel()

        return count

    def _count_operations(self, layer, inputs):
        x = inputs[0].detach()
        if layer not in self._fan_outs:
            self._fan_outs[layer] = fan_out(layer, x.shape[1:])
            self._connections[layer] = int(self._fan_outs[layer].sum(dtype=torch.float64))
        self._operations += float((x.sum(0, dtype=torch.float32) * self._fan_outs[layer]).sum(dtype=torch.float64))

    def firing_rate(self) -> dict[str, float]:
        """Return the spikes per neuron and step, by neuron layer."""
        steps = self.steps * self.recordings
        return {name: spikes / (self._neurons[name] * steps) for name, spikes in self._spikes.items()}

    def synaptic_operations(self) -> float:
        """Return the mean number of synaptic operations per recording."""
        return self._operations / self.recordings

    def macs(self) -> int:
        """Return the multiply-accumulates per recording of the same network without spikes."""
        return self.steps * sum(self._connections.values())


def fan_out(layer: nn.Conv2d | nn.Linear, shape: torch.Size) -> torch.Tensor:
    """Return how many outputs of `layer` each element of an input of `shape` (without batch) reaches.

    With all weights 1, the sum of a layer's outputs has this number as its gradient in each input.
    """
    x = torch.zeros(1, *shape, device=layer.weight.device, requires_grad=True)
    ones = torch.ones_like(layer.weight)
    with torch.enable_grad():
        if isinstance(layer, nn.Linear):
            out = F.linear(x, ones)
        else:
            out = F.conv2d(x, ones, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return torch.autograd.grad(out.sum(), x)[0][0]
