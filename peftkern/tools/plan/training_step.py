"""Allocations of one training step: no tensor, no torch, only their sizes.

A step of a Llama-shaped decoder, with an MLP or a mixture of experts, is written here as eager
PyTorch, transformers and PEFT run it: each operation allocates its output, keeps for backward what
its autograd formula reads, and backward frees that again in reverse. A buffer lives as long as
something refers to it, as a torch storage does, so the peak of the step and its parts follow from
the program; no term of it is fitted. `plan` adds the weights, and tests/tools/test_plan.py compares
with torch's allocator.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftkern.tools.plan.mixture import F32, Mixture, mixture

ACTIVATIONS, CHECKPOINTS, LOGITS = "saved activations", "checkpoints", "logits"
GRADIENTS, TEMPORARIES = "gradients", "temporaries"
PARTS = (ACTIVATIONS, CHECKPOINTS, LOGITS, GRADIENTS, TEMPORARIES)


@dataclass(frozen=True)
class Linear:
    """Linear layer [N, K]: storage of its weight and its trained parts.

    method: "frozen", "full", "lora", "dora" or "adalora"; patched: served by a peftkern op.
    """

    name: str
    K: int
    N: int
    bias: bool
    nf4: bool
    method: str
    patched: bool


@dataclass(frozen=True)
class Shapes:
    """Parameters of the step's allocations. Sizes of elements are in bytes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    linears: dict[str, Linear]
    batch: int
    sequence: int
    r: int
    size: int  # of activations and of weights that are not quantized
    adapter_size: int
    dropout: float
    checkpointing: bool
    eager_attention: bool
    train_all: bool
    ranknum_trained: bool
    double_quant: bool
    cuda: bool
    tied: bool
    mixture: Mixture | None = None
    adapted_stacks: tuple[str, ...] = ()
    qk_norm: str = ""  # "head": q and k are normalized by heads; "all": whole


class Memory:
    """Live bytes, by part, and their peak."""

    def __init__(self, round_to: int = 1) -> None:
        self.round_to = round_to
        self.live: Counter[str] = Counter()
        self.total = 0
        self.start_phase()

    def rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.round_to) * self.round_to

    def start_phase(self) -> None:
        self.peak, self.at_peak = self.total, Counter(self.live)

    def add(self, part: str, nbytes: int) -> None:
        self.live[part] += nbytes
        self.total += nbytes
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, Counter(self.live)


class Buffer:
    """Allocation that is live as long as something refers to this object."""

    __slots__ = ("memory", "nbytes", "part", "saves")

    def __init__(self, memory: Memory, nbytes: int, part: str = TEMPORARIES) -> None:
        self.memory, self.part, self.saves = memory, part, 0
        self.nbytes = memory.rounded(nbytes)
        memory.add(part, self.nbytes)

    def __del__(self) -> None:
        self.memory.add(self.part, -self.nbytes)

    def save(self, part: str = ACTIVATIONS) -> None:
        """Keep it for backward: a temporary becomes an activation."""
        self.saves += 1
        if self.saves == 1 and self.part == TEMPORARIES:
            self._move(part)

    def release(self) -> None:
        self.saves -= 1
        if self.saves == 0 and self.part in (ACTIVATIONS, CHECKPOINTS):
            self._move(TEMPORARIES)

    def _move(self, part: str) -> None:
        self.memory.live[self.part] -= self.nbytes
        self.memory.live[part] += self.nbytes
        self.part = part


class Slot:
    """Accumulator of one tensor's gradients; a second one is added in place, as autograd does."""

    __slots__ = ("grad",)

    def __init__(self) -> None:
        self.grad: Buffer | None = None


class Tensor:
    """View of a buffer: the bytes that it spans, and its slot if it requires a gradient."""

    __slots__ = ("buffer", "nbytes", "slot")

    def __init__(self, buffer: Buffer, nbytes: int, slot: Slot | None) -> None:
        self.buffer, self.nbytes, self.slot = buffer, nbytes, slot


class Frame:
    """Checkpointed layer: its input, and the program that recomputes what it saved."""

    def __init__(self, x: Tensor, program: Callable[[Tensor], Tensor]) -> None:
        self.x, self.program = x, program
        self.count = 0  # operations that saved something
        self.unread = 0
        self.found: list[list[Buffer]] | None = None
        x.buffer.save(CHECKPOINTS)

    def forget(self) -> None:
        self.unread -= 1
        if self.unread == 0:
            self.x.buffer.release()
            self.x = None


class _AllFound(Exception):
    """Early stop: torch's checkpoint ends recomputation at the last saved tensor."""


class Node:
    """Operation on the tape."""

    __slots__ = ("backward", "frame", "index", "out", "saved")

    def __init__(self, out: Slot, saved: list[Buffer], backward: Callable) -> None:
        self.out, self.saved, self.backward = out, saved, backward
        self.frame: Frame | None = None
        self.index = 0


class Tape:
    """Interpreter of operations on sizes: allocation, saving, checkpointing, backward."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.nodes: list[Node] = []
        self.gradients: dict[str, Buffer] = {}
        self.frame: Frame | None = None
        self.replayed: list[list[Buffer]] | None = None
        self.wanted = 0

    def new(self, nbytes: int, part: str = TEMPORARIES) -> Buffer:
        return Buffer(self.memory, nbytes, part)

    def op(
        self,
        inputs: Sequence[Tensor],
        nbytes: int,
        *,
        saves: Sequence[Buffer] = (),
        saves_output: bool = False,
        saves_late: bool = False,
        keeps: bool = False,
        trains: Sequence[tuple[str, int]] = (),
        alias: bool = False,
        part: str = TEMPORARIES,
        forward: int = 0,
        backward: int = 0,
    ) -> Tensor:
        """Run an operation: output of `nbytes`, gradients as large as their inputs.

        saves: what backward reads, besides the output if saves_output; saves_late: known only after
        the output, as in a custom autograd function; keeps: backward reads weights (they count for
        checkpointing, though they cost nothing); trains: (name, bytes) of the parameters that get
        gradients; alias: the incoming gradient is passed on to inputs of its dtype; forward,
        backward: bytes of workspace that live until the operation ends.
        """
        slots = [(x.slot, x.nbytes) for x in inputs if x.slot is not None]
        wants = bool(slots or trains)
        saving = wants and bool(saves or saves_output or keeps)
        if saving and not (saves_late or saves_output):
            self._save(list(saves))
        scratch = self.new(forward) if forward else None
        out = Tensor(self.new(nbytes, part), nbytes, Slot() if wants else None)
        del scratch
        held = [*saves, out.buffer] if saves_output else list(saves)
        if saving and (saves_late or saves_output):
            self._save(held)
        if wants and self.replayed is None:
            self._record(out.slot, held if saving else None, slots, trains, alias, part, backward)
        return out

    def _save(self, buffers: list[Buffer]) -> None:
        if self.replayed is not None:
            for buffer in buffers:
                buffer.save()
            self.replayed.append(buffers)
            if len(self.replayed) == self.wanted:
                raise _AllFound

    def _record(self, out, saved, slots, trains, alias, part, scratch) -> None:
        def backward(grad: Buffer) -> None:
            held = self.new(scratch) if scratch else None
            for slot, nbytes in slots:
                same = alias and self.memory.rounded(nbytes) == grad.nbytes
                given = grad if same else self.new(nbytes, part)
                if slot.grad is None:
                    slot.grad = given
                del given
            for name, nbytes in trains:
                given = self.new(nbytes, GRADIENTS)
                self.gradients.setdefault(name, given)
                del given
            del held

        node = Node(out, [], backward)
        if saved is not None and self.frame is not None:
            node.frame, node.index = self.frame, self.frame.count
            self.frame.count += 1
            self.frame.unread += 1
        elif saved is not None:
            node.saved = saved
            for buffer in saved:
                buffer.save()
        self.nodes.append(node)

    def checkpoint(self, program: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a layer without keeping what it saves; its backward runs it again."""
        self.frame = Frame(x, program)
        try:
            return program(x)
        finally:
            self.frame = None

    def backward(self, out: Tensor) -> None:
        out.slot.grad = self.new(F32)
        while self.nodes:
            node = self.nodes.pop()
            grad, node.out.grad = node.out.grad, None
            if node.frame is not None:
                if node.frame.found is None:
                    self._recompute(node.frame)
                node.saved, node.frame.found[node.index] = node.frame.found[node.index], []
            if grad is not None:
                node.backward(grad)
            del grad
            for buffer in node.saved:
                buffer.release()
            del node.saved[:]
            if node.frame is not None:
                node.frame.forget()
            buffer = None

    def _recompute(self, frame: Frame) -> None:
        self.replayed, self.wanted = [], frame.count
        with contextlib.suppress(_AllFound):
            frame.program(frame.x)
        frame.found, self.replayed = self.replayed, None


class Step(Tape):
    """Forward and backward of a causal language model with adapters."""

    def __init__(self, shapes: Shapes, memory: Memory) -> None:
        super().__init__(memory)
        self.shapes = shapes
        self.tokens = shapes.batch * shapes.sequence

    def run(self) -> dict[str, tuple[int, Counter[str]]]:
        """Return (bytes, parts) at the peak of forward and of backward; gradients stay."""
        self.memory.start_phase()
        loss = self.forward()
        peaks = {"forward": (self.memory.peak, self.memory.at_peak)}
        self.memory.start_phase()
        self.backward(loss)
        self.cos = self.sin = self.mask = None
        peaks["backward"] = (self.memory.peak, self.memory.at_peak)
        return peaks

    def forward(self) -> Tensor:
        loss = self.loss(self.decoder())
        if any(linear.method == "adalora" for linear in self.shapes.linears.values()):
            loss = self.add(loss, self.orthogonality())
        return loss

    def decoder(self) -> Tensor:
        s, T = self.shapes, self.tokens
        embedding = [("embedding", s.vocabulary * s.hidden * s.size)] if s.train_all else []
        embedded = self.op([], T * s.hidden * s.size, trains=embedding)  # held to the end
        if s.checkpointing and embedded.slot is None:
            embedded.slot = Slot()  # PEFT makes it a leaf that requires a gradient
        angle = s.sequence * s.head_dim * s.size
        self.cos, self.sin = self.new(angle), self.new(angle)
        self.mask = self.new(s.sequence**2 * s.size * s.batch) if s.eager_attention else None
        x = embedded
        for i in range(s.layers):
            program = self.layer(i)
            x = self.checkpoint(program, x) if s.checkpointing else program(x)
        if not s.checkpointing:
            self.mask = None  # no formula reads it; a checkpointed layer is recomputed with it
        return self.norm(x, "norm")

    def loss(self, x: Tensor) -> Tensor:
        """Run lm_head, the upcast to float32, log_softmax and the negative log-likelihood.

        The model's forward keeps x and the logits meanwhile."""
        s, T = self.shapes, self.tokens
        name = "embedding" if s.tied else "lm_head"
        logits = self.linear(x, s.linears["lm_head"], name, part=LOGITS)
        wide = self.cast(logits, T * s.vocabulary * F32, part=LOGITS)
        log_p = self.op([wide], wide.nbytes, saves_output=True, part=LOGITS)
        labels = self.new(8 * T)
        return self.op([log_p], F32, saves=[log_p.buffer, labels], part=LOGITS)

    def layer(self, i: int) -> Callable[[Tensor], Tensor]:
        def program(x: Tensor) -> Tensor:
            residual = x
            x = self.norm(x, f"{i}.input_norm")
            x, _weights = self.attention(x, i)  # of eager attention, which the layer keeps
            x = self.add(residual, x)
            residual = x
            x = self.norm(x, f"{i}.post_norm")
            x = self.mlp(x, i) if self.shapes.mixture is None else mixture(self, x, i)
            return self.add(residual, x)

        return program

    def norm(self, x: Tensor, name: str, width: int = 0) -> Tensor:
        """weight * cast(x32 * rsqrt(mean(x32^2) + eps)): x32 and the square root are kept."""
        s = self.shapes
        nbytes = x.nbytes
        wide = nbytes // s.size * F32
        T = nbytes // s.size // (width or s.hidden)
        x = self.cast(x, wide)
        squares = self.op([x], wide, saves=[x.buffer])
        mean = self.op([squares], T * F32)
        squares = None
        shifted = self.op([mean], T * F32, alias=True)
        root = self.op([shifted], T * F32, saves_output=True)
        mean = shifted = None
        # Two gradients of the size of x, one of them summed to that of the root.
        x = self.op([x, root], wide, saves=[x.buffer, root.buffer], backward=wide)
        root = None
        x = self.cast(x, nbytes)
        trains = [(name, s.hidden * s.size)] if s.train_all else []
        saves = [x.buffer] if s.train_all else []
        scratch = nbytes if s.train_all else 0
        return self.op([x], nbytes, saves=saves, keeps=True, trains=trains, backward=scratch)

    def attention(self, x: Tensor, i: int) -> tuple[Tensor, Tensor | None]:
        q = self.projection(x, "q_proj", i)
        k = self.projection(x, "k_proj", i)
        if self.shapes.qk_norm:
            q, k = self.norm_part(q, f"{i}.q_norm"), self.norm_part(k, f"{i}.k_norm")
        v = self.projection(x, "v_proj", i)
        q, k = self.rotate(q, k)
        if self.shapes.eager_attention:
            out, weights = self.eager(q, k, v)
        else:
            out, weights = self.sdpa(q, k, v), None
        return self.projection(out, "o_proj", i), weights

    def norm_part(self, x: Tensor, name: str) -> Tensor:
        s = self.shapes
        of_token = x.nbytes // s.size // self.tokens
        return self.norm(x, name, s.head_dim if s.qk_norm == "head" else of_token)

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """x * cos + rotate_half(x) * sin: only the two angles are kept."""
        return self.rotate_one(q), self.rotate_one(k)

    def rotate_one(self, x: Tensor) -> Tensor:
        turned = self.op([x], x.nbytes, saves=[self.cos])
        half = self.op([x], x.nbytes, forward=x.nbytes // 2, backward=x.nbytes)
        half = self.op([half], x.nbytes, saves=[self.sin])
        return self.op([turned, half], x.nbytes, alias=True)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep q, k, v, the output and a log-sum-exp in float32 for each row and head."""
        lse = self.new(self.tokens * self.shapes.heads * F32)
        saves = [q.buffer, k.buffer, v.buffer, lse]
        return self.op([q, k, v], q.nbytes, saves=saves, saves_output=True)

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(q k^T * scale + mask) v, every matrix in memory."""
        s = self.shapes
        groups = s.heads // s.kv_heads
        if groups > 1:
            k = self.op([k], q.nbytes)
            v = self.op([v], q.nbytes)
        scores = s.batch * s.heads * s.sequence**2
        q = self.flatten(q)
        k_flat = k if groups > 1 else self.flatten(k)
        p = self.op([q, k_flat], scores * s.size, saves=[q.buffer, k_flat.buffer])
        k_flat = None
        p = self.op([p], p.nbytes)
        p = self.op([p], p.nbytes, alias=True)
        p = self.cast(p, scores * F32)
        p = self.op([p], scores * F32, saves_output=True)
        p = self.cast(p, scores * s.size)
        v_flat = v if groups > 1 else self.flatten(v)
        out = self.op([p, v_flat], q.nbytes, saves=[p.buffer, v_flat.buffer])
        v_flat = None
        return self.op([out], q.nbytes), p

    def flatten(self, x: Tensor) -> Tensor:
        """[batch, heads, sequence, head_dim] as one batch of matrices, copied if it is strided."""
        return x if self.shapes.batch == 1 else self.op([x], x.nbytes)

    def mlp(self, x: Tensor, i: int) -> Tensor:
        gate = self.projection(x, "gate_proj", i)
        gate = self.op([gate], gate.nbytes, saves=[gate.buffer])
        up = self.projection(x, "up_proj", i)
        product = self.op([gate, up], gate.nbytes, saves=[gate.buffer, up.buffer])
        gate = up = None
        return self.projection(product, "down_proj", i)

    def projection(self, x: Tensor, name: str, i: int) -> Tensor:
        linear = self.shapes.linears[name]
        prefix = f"{i}.{name}"
        if linear.patched:
            return self.fused(x, linear, prefix)
        if linear.method == "lora":
            return self.lora(x, linear, prefix)
        if linear.method == "dora":
            return self.dora(x, linear, prefix)
        if linear.method == "adalora":
            return self.adalora(x, linear, prefix)
        return self.linear(x, linear, prefix)

    def linear(self, x: Tensor, linear: Linear, name: str, part: str = TEMPORARIES) -> Tensor:
        """x W^T: a frozen weight keeps nothing of x; a quantized one is made dense, and again."""
        s, T = self.shapes, self.tokens
        nbytes = T * linear.N * s.size
        weight = linear.K * linear.N * s.size
        if linear.method == "full":
            trains = [(name, weight)]
            if linear.bias:
                trains.append((f"{name}.bias", linear.N * s.size))
            return self.op([x], nbytes, saves=[x.buffer], trains=trains, part=part)
        if not linear.nf4:
            return self.op([x], nbytes, keeps=True, part=part)
        scratch = weight + self.absmax_scratch(linear)
        return self.op([x], nbytes, forward=scratch, backward=scratch)

    def absmax_scratch(self, linear: Linear) -> int:
        """Allocate the float32 absmax of double quantization, made before the weight is read."""
        return -(-linear.K * linear.N // 64) * F32 if self.shapes.double_quant else 0

    def fused(self, x: Tensor, linear: Linear, name: str) -> Tensor:
        """Run peftkern's op, which keeps x in its own dtype and S = x A^T in float32.

        A CPU keeps dropout's mask too, a GPU its seed; a CPU multiplies with an NF4 weight as it
        is, a GPU makes it dense for the matmul.
        """
        s, T = self.shapes, self.tokens
        S = self.new(T * s.r * F32)
        saves = [x.buffer, S]
        if s.dropout and not s.cuda:
            saves.append(self.new(x.nbytes // s.size))
        if linear.method == "adalora":
            saves.append(self.new(s.r * linear.K * F32))  # E and the scaling folded into A
        scratch = linear.K * linear.N * s.size if linear.nf4 and s.cuda else 0
        dS = T * s.r * F32
        return self.op(
            [x],
            T * linear.N * s.size,
            saves=saves,
            saves_late=True,
            trains=self.adapter_gradients(linear, name),
            forward=scratch,
            backward=scratch + dS,
        )

    def adapter_gradients(self, linear: Linear, name: str) -> list[tuple[str, int]]:
        s = self.shapes
        trains = [
            (f"{name}.lora_A", s.r * linear.K * s.adapter_size),
            (f"{name}.lora_B", s.r * linear.N * s.adapter_size),
        ]
        if linear.method == "adalora":
            trains.append((f"{name}.lora_E", s.r * s.adapter_size))
        return trains

    def low_rank(self, x: Tensor, linear: Linear, name: str) -> Tensor:
        """dropout(x) A^T B^T in the adapter's dtype, as two linear layers."""
        return self.low_rank_dropped(self.drop(x), linear, name)

    def low_rank_dropped(self, x: Tensor, linear: Linear, name: str) -> Tensor:
        s, T = self.shapes, self.tokens
        (A, A_bytes), (B, B_bytes), *_ = self.adapter_gradients(linear, name)
        S = self.op([x], T * s.r * s.adapter_size, saves=[x.buffer], trains=[(A, A_bytes)])
        x = None
        out = T * linear.N * s.adapter_size
        return self.op([S], out, saves=[S.buffer], trains=[(B, B_bytes)])

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout, which keeps a mask: a byte per element on a GPU, the noise on a CPU."""
        s = self.shapes
        if not s.dropout:
            return x
        elements = x.nbytes // s.adapter_size
        mask = self.new(elements if s.cuda else x.nbytes)
        return self.op([x], x.nbytes, saves=[mask])

    def lora(self, x: Tensor, linear: Linear, name: str) -> Tensor:
        """PEFT: y + lora_B(lora_A(dropout(x))) * scaling, x cast to the adapter's dtype first."""
        y = self.base(x, linear, name)
        x = self.cast(x, x.nbytes // self.shapes.size * self.shapes.adapter_size)
        update = self.low_rank(x, linear, name)
        update = self.op([update], update.nbytes)
        if linear.nf4:
            update = self.cast(update, y.nbytes)
        nbytes = y.nbytes
        y = self.add(y, update)
        return self.cast(y, nbytes)

    def base(self, x: Tensor, linear: Linear, name: str) -> Tensor:
        """Run the frozen layer; PEFT clones the output of bitsandbytes."""
        y = self.linear(x, linear, name)
        return self.op([y], y.nbytes, alias=True) if linear.nf4 else y

    def adalora(self, x: Tensor, linear: Linear, name: str) -> Tensor:
        """PEFT: y += dropout(x) (A * E)^T B^T * scaling / ranknum."""
        s, T = self.shapes, self.tokens
        y = self.base(x, linear, name)
        x = self.cast(x, x.nbytes // s.size * s.adapter_size)
        A, B, E = self.adapter_gradients(linear, name)
        dropped = self.drop(x)
        AE = self.op([], A[1], keeps=True, trains=[A, E], backward=A[1])
        S = self.op([dropped, AE], T * s.r * s.adapter_size, saves=[dropped.buffer, AE.buffer])
        dropped = AE = None
        update = self.op([S], T * linear.N * s.adapter_size, saves=[S.buffer], trains=[B])
        S = None
        if linear.nf4:
            update = self.cast(update, y.nbytes)
        scaled = self.op([update], update.nbytes)
        if not linear.nf4:
            update = None
        update = self.divide_by_ranknum(scaled, T * linear.N * s.adapter_size, name)
        scaled = None
        return self.add(y, update, into=y)

    def divide_by_ranknum(self, x: Tensor, nbytes: int, name: str) -> Tensor:
        """x / ranknum, a tensor of one element in the adapter's dtype.

        PEFT trains ranknum where it casts it, by oversight; the quotient's formula keeps x then,
        and needs -grad, x / ranknum and the same once more.
        """
        trains = [(f"{name}.ranknum", self.shapes.adapter_size)]
        scratch = nbytes if x.nbytes != nbytes and not self.shapes.cuda else 0
        if not self.shapes.ranknum_trained:
            return self.op([x], nbytes, keeps=True, forward=scratch)
        saves = [x.buffer]
        return self.op(
            [x], nbytes, saves=saves, trains=trains, forward=scratch, backward=3 * nbytes
        )

    def orthogonality(self) -> Tensor:
        """AdaLoRA's penalty: A A^T - I and B^T B - I of every layer, and first gradients."""
        s = self.shapes
        trains = [
            gradient
            for i in range(s.layers)
            for linear in s.linears.values()
            if linear.method == "adalora"
            for gradient in self.adapter_gradients(linear, f"{i}.{linear.name}")[:2]
        ]
        residual = self.new(len(trains) * s.r**2 * s.adapter_size)
        return self.op([], F32, saves=[residual], trains=trains)

    def dora(self, x: Tensor, linear: Linear, name: str) -> Tensor:
        """PEFT: y + (m - 1) * base + m * lora_B(lora_A(x)) * scaling, m = magnitude / |W + s B A|.

        The norm is that of a dense matrix in the adapter's dtype, for which lora_B lora_A is
        multiplied with an identity [K, K]; all of them live until the layer returns.
        """
        s, T = self.shapes, self.tokens
        K, N, size = linear.K, linear.N, s.adapter_size
        nbytes = T * N * s.size
        y = self.base(x, linear, name)
        x = self.cast(x, x.nbytes // s.size * size)
        dropped = self.drop(x)
        product = [self.new(n * size) for n in (K * K, K * s.r, K * N)]
        if self.frame is not None:
            del product[:2]  # kept for a backward that never comes; a checkpoint keeps nothing
        dense = self.new(K * N * s.size) if linear.nf4 else None
        if size != s.size:
            dense = self.new(K * N * size)
        self.new(2 * K * N * size)  # scaling * B A and its sum with W, gone when the norm is known
        low = self.low_rank_dropped(dropped, linear, name)
        if s.dropout:
            saves = [] if dense is None else [dense]
            base = self.op([dropped], T * N * size, saves=saves, keeps=True)
        elif linear.bias:
            base = self.op([y], nbytes, alias=True)
        else:
            base = y
        magnitude = [(f"{name}.magnitude", N * size)]
        wide = T * N * size
        first = self.op([base], wide, saves=[base.buffer], trains=magnitude, backward=wide)
        second = self.op([low], wide, saves=[low.buffer], trains=magnitude, backward=wide)
        second = self.op([second], wide)
        update = self.add(first, second)
        first = second = None
        y = self.add(y, update)
        del product, dense
        return self.cast(y, nbytes)

    def cast(self, x: Tensor, nbytes: int, part: str = TEMPORARIES) -> Tensor:
        """Cast, and cast the gradient back; the same dtype is the same tensor."""
        return x if nbytes == x.nbytes else self.op([x], nbytes, part=part)

    def add(self, x: Tensor, y: Tensor, into: Tensor | None = None) -> Tensor:
        """x + y in the wider dtype, to which a CPU copies the narrower one first."""
        wide = max(x.nbytes, y.nbytes)
        scratch = wide if x.nbytes != y.nbytes and not self.shapes.cuda else 0
        if into is None:
            return self.op([x, y], wide, alias=True, forward=scratch)
        out = self.op([x, y], 0, alias=True, forward=2 * scratch)  # the sum is narrowed as well
        return Tensor(into.buffer, into.nbytes, out.slot)
