"""What is compared with what, at which sizes, and which ratio is aimed at."""

from dataclasses import dataclass

# The workers: ours (main.rs), Python's (peers.py), and Python's with a malloc that keeps large buffers.
OURS, PYTHON, TUNED = "ours", "python", "python, malloc tuned"

RANK = 16
SMALL = ("512x512", 64)
SHAPES = ("4096x4096", "4096x14336")
MB = 1_000_000


@dataclass(frozen=True)
class Peer:
    """Something we are compared with."""

    name: str
    # (worker, case) pairs that do the same; the fastest of them counts.
    ways: tuple
    # We aim to be at least so many times as fast ...
    target: float | None = None
    # ... and to need at most so much of its memory.
    memory_target: float | None = None


@dataclass(frozen=True)
class Row:
    """One case of ours and its peers."""

    title: str
    ours: str
    peers: tuple
    # Whether peak memory is measured too, and the most bytes we aim at.
    memory: bool = False
    memory_limit: int | None = None

    @property
    def key(self):
        return f"{self.title}: {self.ours}"


def case(subject, dtype, shape, tokens=0, rank=0):
    return f"{subject}/{dtype}/{shape}/{tokens}/{rank}"


def rows(quick=False):
    """The whole table; quick: everything at the small size only."""
    sizes = [(SMALL[0], (1, SMALL[1]))]
    if not quick:
        sizes += [(shape, (1, 16, 128, 512)) for shape in SHAPES]
    table = []
    for shape, tokens in sizes:
        table += [quantize(shape), quantize_linear(shape), *dequantize(shape)]
        table += [product(dtype, shape, n) for dtype in ("f32", "bf16") for n in tokens]
        table += [
            layer(shape, n)
            for layer in (qlora_f32, qlora_bf16, lora_f32, dora_f32, qdora_f32)
            for n in tokens
            if n >= 64
        ]
    return table + steps()


def quantize(shape):
    target = 100 if shape in SHAPES else None
    peer = Peer("bitsandbytes", ((PYTHON, case("bnb-quantize", "f32", shape)),), target)
    return Row(f"quantise {shape}", case("quantize", "f32", shape), (peer,))


def quantize_linear(shape):
    """From Burn's layout, transposed on the way: what a user calls."""
    peer = Peer("bitsandbytes", ((PYTHON, case("bnb-quantize", "f32", shape)),))
    return Row(f"quantise {shape} from Burn's layout", case("quantize-linear", "f32", shape), (peer,))


def dequantize(shape):
    """Like against like: into the same memory every time, and into fresh memory."""
    for dtype in ("f32", "bf16"):
        for ours, peer, what in (
            ("dequantize-reused", "bnb-dequantize-reused", "buffer reused"),
            ("dequantize", "bnb-dequantize", "fresh buffers"),
        ):
            target = 1.0 if dtype == "f32" and shape in SHAPES and what == "buffer reused" else None
            peers = (Peer("bitsandbytes", ((PYTHON, case(peer, dtype, shape)),), target),)
            yield Row(f"dequantise {shape} to {dtype}, {what}", case(ours, dtype, shape), peers)


def product(dtype, shape, tokens):
    def size(subject):
        return case(subject, dtype, shape, tokens)

    dense = ((PYTHON, size("torch-dense")), (PYTHON, size("torch-dense-in-out")))
    small = shape == SMALL[0]
    if dtype == "f32":
        # Burn's has no bf16 product of its own: it converts.
        dense += ((OURS, size("burn-dense")), (OURS, size("burn-dense-view")))
        targets = {
            "dense": 4.0 if tokens == 1 else 1.0,
            "training": {16: 2.5, 128: 2.5, 512: 1.6}.get(tokens),
        }
    else:
        targets = {
            "dense": None if tokens == 1 else 0.9,
            "inference": 1.2 if tokens == 1 else 1.3,
            "training": {128: 2.0, 512: 1.25}.get(tokens),
        }
    if small:
        targets = {}
    peers = [
        Peer(f"dense {dtype}, the best", dense, targets.get("dense")),
        Peer("bitsandbytes, training", ((PYTHON, size("bnb-training")),), targets.get("training")),
        Peer("bitsandbytes, training, malloc tuned", ((TUNED, size("bnb-training")),)),
    ]
    if dtype == "bf16":
        inference = ((PYTHON, size("bnb-inference")),)
        peers.append(Peer("bitsandbytes, inference", inference, targets.get("inference")))
    if small:
        plain = ((OURS, size("product-plain")),)
        peers.append(Peer("ours, dequantised and multiplied", plain, target=1.0))
    return Row(f"product {shape}, {dtype}, {rows_of(tokens)}", size("product"), tuple(peers))


def qlora_f32(shape, tokens):
    size = size_of("f32", shape, tokens)
    peers = [
        Peer("PEFT", ((PYTHON, size("peft-qlora")),), {128: 2.2, 512: 1.5}.get(tokens)),
        Peer("PEFT, malloc tuned", ((TUNED, size("peft-qlora")),)),
    ]
    if tokens <= 128:
        target, memory = (4.0, 0.3) if tokens == 128 else (1.0, None)
        peers.append(Peer("Burn's apply_qlora", ((OURS, size("burn-qlora")),), target, memory))
    return trained("QLoRA", "f32", shape, tokens, size("qlora"), peers)


def qlora_bf16(shape, tokens):
    size = size_of("bf16", shape, tokens)
    peers = [
        Peer("PEFT", ((PYTHON, size("peft-qlora")),)),
        Peer(
            "PEFT, malloc tuned",
            ((TUNED, size("peft-qlora")),),
            {128: 1.3, 512: 1.1}.get(tokens),
        ),
    ]
    return trained("QLoRA", "bf16", shape, tokens, size("qlora"), peers)


def lora_f32(shape, tokens):
    size = size_of("f32", shape, tokens)
    peers = [
        Peer("PEFT", ((PYTHON, size("peft-lora")),), 1.05 if tokens >= 128 else None),
        Peer("PEFT, malloc tuned", ((TUNED, size("peft-lora")),)),
    ]
    if tokens <= 128:
        target, memory = (3.5, 0.6) if tokens == 128 else (1.0, None)
        peers.append(Peer("Burn's apply_lora", ((OURS, size("burn-lora")),), target, memory))
    return trained("LoRA", "f32", shape, tokens, size("lora"), peers)


def dora_f32(shape, tokens):
    return dora("DoRA", "dora", shape, tokens)


def qdora_f32(shape, tokens):
    return dora("DoRA on NF4", "qdora", shape, tokens)


def dora(title, subject, shape, tokens):
    size = size_of("f32", shape, tokens)
    theirs = size(f"peft-{subject}")
    peers = [Peer("PEFT", ((PYTHON, theirs),)), Peer("PEFT, malloc tuned", ((TUNED, theirs),))]
    return trained(title, "f32", shape, tokens, size(subject), peers)


def steps():
    """The whole train step; its sizes are its own."""

    def step(subject, dtype):
        return case(subject, dtype, "0x0")

    def row(method, dtype, target, limit=None):
        subject = f"step-peft-{method.lower()}"
        peers = (
            Peer("PEFT", ((PYTHON, step(subject, dtype)),), target),
            Peer("PEFT, malloc tuned", ((TUNED, step(subject, dtype)),)),
        )
        ours = step(f"step-{method.lower()}", dtype)
        return Row(f"train step, {method} {dtype}", ours, peers, memory=True, memory_limit=limit)

    return [
        row("QLoRA", "f32", 1.5, limit=350 * MB),
        row("QLoRA", "bf16", 1.3),
        row("LoRA", "f32", None),
    ]


def size_of(dtype, shape, tokens):
    return lambda subject: case(subject, dtype, shape, tokens, RANK)


def trained(method, dtype, shape, tokens, ours, peers):
    title = f"{method} forward and backward {shape}, {dtype}, {rows_of(tokens)}"
    return Row(title, ours, tuple(peers), memory=True)


def rows_of(tokens):
    return "1 row" if tokens == 1 else f"{tokens} rows"


@dataclass(frozen=True)
class Curve:
    """How the time grows with one quantity: lines of (worker, cases along it)."""

    title: str
    axis: str
    values: tuple
    # Name, worker, and the case at a value.
    lines: tuple
    # Whether the value is the number of threads, for which workers are started anew.
    threads: bool = False


def curves(quick=False):
    def pick(values):
        return values[:2] if quick else values

    width = "512x512" if quick else "4096x4096"

    def lines(at):
        """QLoRA, forward and backward, ours and PEFT's."""
        return tuple(
            (f"{name}, {dtype}", worker, lambda value, s=subject, d=dtype: at(s, d, value))
            for name, worker, subject in (
                ("QLoraLinear", OURS, "qlora"),
                ("PEFT, malloc tuned", TUNED, "peft-qlora"),
            )
            for dtype in ("f32", "bf16")
        )

    return [
        Curve(
            f"Tokens ({width}, rank {RANK})",
            "tokens",
            pick((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)),
            lines(lambda subject, dtype, n: case(subject, dtype, width, n, RANK)),
        ),
        Curve(
            f"Width (square, 128 tokens, rank {RANK})",
            "width",
            pick((512, 1024, 2048, 4096, 8192, 14336)),
            lines(lambda subject, dtype, n: case(subject, dtype, f"{n}x{n}", 128, RANK)),
        ),
        Curve(
            f"Threads ({width}, 128 tokens, rank {RANK})",
            "threads",
            (1, 2),
            lines(lambda subject, dtype, _: case(subject, dtype, width, 128, RANK)),
            threads=True,
        ),
        Curve(
            f"Rank ({width}, 128 tokens)",
            "rank",
            pick((4, 8, 16, 32, 64, 128, 256)),
            lines(lambda subject, dtype, n: case(subject, dtype, width, 128, n)),
        ),
    ]
