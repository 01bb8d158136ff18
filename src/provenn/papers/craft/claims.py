"""What CRAFT claims, measured."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from provenn import bench
from provenn.evidence import Measurement, Run, Series, Table, measures
from provenn.nn.padding import PadToMultiple
from provenn.papers.craft.layers import HFB, HFERB, SRWAB, InterAttention, RectangleWindowAttention
from provenn.papers.craft.model import CRAFT, CRFB, craft_x2, craft_x3, craft_x4, cross_refinement
from provenn.tasks import Recipe, TaskData, fit
from provenn.tasks.super_resolution import TASK, Whole, before_and_after, luma, reduced, restore

DIM = 24


# Exact claims


@measures("parameters_x2")
def parameters_x2(run: Run) -> Measurement:
    return Measurement.exact(bench.count_parameters(craft_x2()), unit="parameters")


@measures("parameters_x3")
def parameters_x3(run: Run) -> Measurement:
    return Measurement.exact(bench.count_parameters(craft_x3()), unit="parameters")


@measures("parameters_x4")
def parameters_x4(run: Run) -> Measurement:
    return Measurement.exact(bench.count_parameters(craft_x4()), unit="parameters")


@measures("fewer_parameters")
def fewer_parameters(run: Run) -> Measurement:
    """SwinIR-light counted from its published configuration, with and without its tables of position biases."""
    rows: list[list[str | float | int | None]] = []
    for scale, build in ((2, craft_x2), (3, craft_x3), (4, craft_x4)):
        ours = bench.count_parameters(build())
        theirs, tables = swinir_light(scale)
        rows.append([f"×{scale}", ours, theirs, theirs - tables, round(ours / theirs, 3)])
    return Measurement.exact(
        ours / theirs,
        unit="of SwinIR-light's parameters, ×4",
        note="SwinIR prints 878K, 886K and 897K: its counts without the position tables, which are learnt too.",
        tables=[
            Table(
                caption="Parameters",
                columns=["scale", "CRAFT", "SwinIR-light", "without position tables", "CRAFT / SwinIR-light"],
                rows=rows,
            )
        ],
    )


def swinir_light(scale: int) -> tuple[int, int]:
    """Parameters of SwinIR-light (Liang et al., 2021), and how many of them are tables of position biases.

    A block has two normalisations, queries, keys and values, a projection, an MLP of twice the width and one table;
    a group ends in a 3×3 convolution; a first and a last 3×3 convolution, two normalisations, and one convolution
    before the pixel shuffle.
    """
    dim, groups, blocks, heads, window = 60, 4, 6, 6, 8
    table = (2 * window - 1) ** 2 * heads
    conv = 9 * dim * dim + dim
    block = 2 * 2 * dim + 3 * dim * (dim + 1) + dim * (dim + 1) + 2 * dim * (dim + 1) + dim * (2 * dim + 1) + table
    ends = 3 * 9 * dim + dim + conv + 2 * 2 * dim + 3 * scale**2 * (9 * dim + 1)
    return groups * (blocks * block + conv) + ends, groups * blocks * table


@measures("linear_in_pixels")
def linear_in_pixels(run: Run) -> Measurement:
    """Multiply-adds for square inputs, beside attention among all pixels; nothing is computed."""
    sides = [32, 64, 128]
    parts: dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[Tensor]]]] = {
        "CRAFT ×4": (craft_x4, lambda n: [torch.zeros(1, 3, n, n)]),
        "SRWAB": (partial(SRWAB, 48), lambda n: [torch.zeros(1, 48, n, n)]),
        "HFB": (partial(HFB, 48), lambda n: 2 * [torch.zeros(1, 48, n, n)]),
        "attention over all pixels": (partial(nn.MultiheadAttention, 48, 6), lambda n: 3 * [torch.zeros(n * n, 1, 48)]),
    }
    counts: dict[str, list[int]] = {}
    for name, (build, inputs) in parts.items():
        with torch.device("meta"):
            module = build().eval()
            counts[name] = [bench.macs(partial(module, *inputs(n))) for n in sides]
    with torch.device("meta"):
        hd = {
            scale: bench.macs(
                partial(build().eval(), torch.zeros(1, 3, *(-(-side // scale) + 15 & -16 for side in (720, 1280))))
            )
            for scale, build in ((2, craft_x2), (3, craft_x3), (4, craft_x4))
        }
    pixels = [n * n for n in sides]
    growths = {name: bench.growth(pixels, values) for name, values in counts.items()}
    linear = all(m * pixels[0] == counts["CRAFT ×4"][0] * p for m, p in zip(counts["CRAFT ×4"], pixels))
    return Measurement.holds(
        linear,
        f"CRAFT ×4 takes {counts['CRAFT ×4'][1] / 1e9:.3f} G multiply-adds for 64×64 pixels",
        series=[
            Series(
                name=name,
                x=[float(p) for p in pixels],
                y=[float(v) for v in values],
                plot="multiply-adds",
                x_label="input pixels",
                y_label="multiply-adds",
                log="xy",
            )
            for name, values in counts.items()
        ],
        tables=[
            Table(
                caption="How multiply-adds grow with pixels",
                columns=["part", "exponent"],
                rows=[[name, round(g.exponent, 3)] for name, g in growths.items()],
            ),
            Table(
                caption="Multiply-adds for an output of 1280×720, the input padded to multiples of 16",
                columns=["scale", "10⁹"],
                rows=[[f"×{scale}", round(count / 1e9, 1)] for scale, count in hd.items()],
            ),
        ],
    )


@torch.no_grad()
def _largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _loud(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a size at which every branch matters."""
    from provenn.testing import seeded_state

    module.load_state_dict(seeded_state({name: t.shape for name, t in module.state_dict().items()}, seed))
    return module.eval()


@measures("position_bias_is_dead")
def position_bias_is_dead(run: Run) -> Measurement:
    """The spread of each bias over its offsets, with random weights, at the published width and at a repaired one."""
    spread = {}
    for width in (None, 2, 8):
        attention = RectangleWindowAttention(48, position_dim=width)
        biases = [_loud(b)() for b in attention.bias]
        spread[width] = max(b.flatten(1).std(dim=1).max().item() for b in biases)
    return Measurement.holds(
        spread[None] == 0.0 and min(spread[2], spread[8]) > 0,
        "largest spread over offsets: "
        + ", ".join(f"{s:.2g} at width {w or '1 (published)'}" for w, s in spread.items()),
    )


@measures("windows_wrap_around")
def windows_wrap_around(run: Run) -> Measurement:
    """Which positions of a 32×32 map move when its corner does, the locality convolution off."""
    reach = {}
    for wrap in (True, False):
        block = _loud(SRWAB(48, shifted=True, wrap=wrap))
        assert isinstance(block, SRWAB)
        nn.init.zeros_(block.locality.weight)
        x = torch.randn(1, 48, 32, 32, generator=torch.Generator().manual_seed(0))
        moved = x.clone()
        moved[..., 0, 0] *= -1
        with torch.no_grad():
            reach[wrap] = (block(moved) - block(x)).abs().amax(dim=1)[0] > 1e-7
    far = reach[True][24:].any() and reach[True][:, 24:].any()
    return Measurement.holds(
        bool(far) and int(reach[True].sum()) == 112 and int(reach[False].sum()) == 28,
        f"the corner pixel reaches {int(reach[True].sum())} positions, on opposite borders too; "
        f"{int(reach[False].sum())} with a mask",
    )


@measures("fusion_ignores_strength")
def fusion_ignores_strength(run: Run) -> Measurement:
    """What the HFB makes of the high-frequency branch, and of the same branch 1000 times stronger or weaker."""
    block = _loud(HFB(48))
    low, high = (torch.randn(1, 48, 24, 24, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    with torch.no_grad():
        y = block(low, high)
        worst = max(_largest_difference(block(low, factor * high), y) for factor in (1e-3, 1e3))
        turned = _largest_difference(block(low, -high), y)
    return Measurement.holds(
        worst < 1e-4 < turned, f"largest change {worst:.1e}; {turned:.2g} when the branch changes its sign"
    )


@measures("padding_rule_matters")
def padding_rule_matters(run: Run) -> Measurement:
    """One 32×32 image through one network, padded as the authors' evaluation and validation pad."""
    model = _loud(craft_x2())
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        evaluation = PadToMultiple(model, 16, 2, mode="symmetric", always=True)(x)
        validation = PadToMultiple(model, 16, 2, mode="reflect")(x)
    middle = (..., slice(24, 40), slice(24, 40))
    difference = _largest_difference(evaluation[middle], validation[middle])
    return Measurement.holds(
        difference > 1e-4, f"in the middle of the image the two differ by up to {difference:.2g} with random weights"
    )


# Cost claims


@measures("one_attention_call")
def one_attention_call(run: Run) -> Measurement:
    """Both window shapes gathered into one batch of windows, against one call for each."""
    attention = RectangleWindowAttention(48, shifted=True).to(run.device).eval()
    sides = [16] if run.smoke else [32, 64, 128]
    rounds = 2 if run.smoke else 9
    rows: list[list[str | float | int | None]] = []
    with torch.no_grad():
        for side in sides:
            qkv = torch.randn(1, side, side, 144, device=run.device)
            together, apart = partial(_in_one_call, attention, qkv), partial(attention, qkv)
            if _largest_difference(together(), apart()) > 1e-4:
                raise RuntimeError("the two forms of the attention disagree")
            result = bench.compare(together, apart, rounds=rounds)
            rows.append([f"{side}×{side}", round(result.ratio, 3), *(round(b, 3) for b in result.interval)])
    return Measurement.figure(
        result.ratio,
        result.interval,
        method=result.method,
        unit=f"time of one call / time of two, {side}×{side}",
        setting={"dim": 48, "heads": 6, "rounds": rounds, "threads": torch.get_num_threads()},
        tables=[Table(caption="One call against two", columns=["map", "ratio", "low", "high"], rows=rows)],
    )


def _in_one_call(attention: RectangleWindowAttention, qkv: Tensor) -> Tensor:
    """Both shapes hold 64 tokens, so their windows fit one batch once they are copied side by side."""
    height, width = qkv.shape[1:3]
    heads = attention.heads // 2
    pair = rearrange(qkv, "b h w (three half c) -> half b h w three c", three=3, half=2)
    parts = [
        rearrange(
            part.roll((-down, -right), dims=(1, 2)),
            "b (i r) (j c) three (head d) -> three (b i j) head (r c) d",
            head=heads,
            r=rows,
            c=columns,
        )
        for part, (rows, columns), (down, right) in zip(pair, attention.windows, attention.shifts)
    ]
    attended = F.scaled_dot_product_attention(*torch.cat(parts, dim=2)).chunk(2, dim=1)
    halves = [
        rearrange(
            part,
            "(b i j) head (r c) d -> b (i r) (j c) (head d)",
            i=height // rows,
            j=width // columns,
            r=rows,
        ).roll((down, right), dims=(1, 2))
        for part, (rows, columns), (down, right) in zip(attended, attention.windows, attention.shifts)
    ]
    return torch.cat(halves, dim=-1)


@measures("memory_linear_in_pixels")
def memory_linear_in_pixels(run: Run) -> Measurement:
    """The most bytes that activations hold at once, counted, for inputs of growing size."""
    sides = [16, 32, 48] if run.smoke else [32, 64, 128]
    model = craft_x4().to(run.device).eval()
    with torch.no_grad():
        held = [
            bench.peak_activation_bytes(partial(model, torch.rand(1, 3, n, n, device=run.device)), device=run.device)
            for n in sides
        ]
    growth = bench.growth([n * n for n in sides], held)
    line = Series(
        name="CRAFT ×4",
        x=[float(n * n) for n in sides],
        y=[float(b) for b in held],
        plot="peak activation memory",
        x_label="input pixels",
        y_label="bytes",
        log="xy",
    )
    return Measurement.figure(
        growth.exponent,
        growth.interval,
        method=growth.method,
        unit="exponent of bytes over pixels",
        setting={"sides": sides},
        note=f"{held[-1] / 2**20:.0f} MiB for {sides[-1]}×{sides[-1]} pixels",
        series=[line],
    )


@measures("long_windows_cost_no_more")
def long_windows_cost_no_more(run: Run) -> Measurement:
    """An SRWAB with windows of 4×16 and 16×4 pixels, against one with 8×8: as many pixels, as many weights."""
    long, square = (SRWAB(48, shifted=True, window=w).to(run.device).eval() for w in ((4, 16), (8, 8)))
    return _timed(run, long, square, 1, [16, 32, 64], "time of long windows / time of square ones")


@measures("channels_cost_less_than_positions")
def channels_cost_less_than_positions(run: Run) -> Measurement:
    """The HFB's attention across channels, against attention of every pixel to every other with the same weights."""
    channels, positions = (kind(48).to(run.device).eval() for kind in (InterAttention, PositionAttention))
    return _timed(run, channels, positions, 2, [8, 16, 32], "time of attention across channels / among positions")


class PositionAttention(InterAttention):
    """The same queries, keys and values, but each pixel attends to all pixels."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        q, k, v = (
            rearrange(t, "b (head c) h w -> b head (h w) c", head=self.heads)
            for t in (self.q(high), *self.kv(low).chunk(2, dim=1))
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.project(rearrange(mixed, "b head (h w) c -> b (head c) h w", h=low.shape[2]))


def _timed(run: Run, system: nn.Module, baseline: nn.Module, inputs: int, sides: list[int], unit: str) -> Measurement:
    """Two modules side by side on maps of growing size; the effect is that of the largest."""
    rounds = 2 if run.smoke else 9
    rows: list[list[str | float | int | None]] = []
    with torch.no_grad():
        for side in [16] if run.smoke else sides:
            maps = [torch.randn(1, 48, side, side, device=run.device) for _ in range(inputs)]
            calls = partial(system, *maps), partial(baseline, *maps)
            result = bench.compare(*calls, rounds=rounds)
            held = [bench.peak_activation_bytes(call, device=run.device) for call in calls]
            counted = [bench.macs(call) for call in calls]
            times = (round(t, 3) for t in (result.ratio, *result.interval))
            rows.append([f"{side}×{side}", *times, round(held[0] / held[1], 3), round(counted[0] / counted[1], 3)])
    return Measurement.figure(
        result.ratio,
        result.interval,
        method=result.method,
        unit=f"{unit}, {side}×{side}",
        setting={"dim": 48, "rounds": rounds, "threads": torch.get_num_threads()},
        tables=[
            Table(
                caption=unit.capitalize(),
                columns=["map", "time", "low", "high", "peak bytes", "multiply-adds"],
                rows=rows,
            )
        ],
    )


# Quality claims: small networks of equal size, trained alike


class ConvPair(nn.Module):
    """x + conv3×3(GELU(conv3×3(x))), what convolutional super-resolution is made of."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.expand = nn.Conv2d(dim, hidden, 3, padding=1)
        self.project = nn.Conv2d(hidden, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.gelu(self.expand(x)))


def _windows(dim: int, count: int = 2) -> nn.Sequential:
    return nn.Sequential(*(SRWAB(dim, shifted=bool(k % 2)) for k in range(count)))


def _refilled(dim: int, low: nn.Module, high: nn.Module) -> CRFB:
    """A block that lacks a branch; what it lacks in parameters, the gated network of its HFB gets."""
    whole = bench.count_parameters(cross_refinement(dim))
    lacking = whole - sum(map(bench.count_parameters, (low, high, HFB(dim))))
    hidden = int(2.66 * dim) + round(lacking / (3 * dim + 18))
    return CRFB(low, high, HFB(dim, expansion=(hidden + 0.5) / dim))


# One block of each network. All networks have as many parameters as the full one, within 3 %.
BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "CRAFT": cross_refinement,
    "without HFERB": lambda dim: _refilled(dim, _windows(dim), nn.Identity()),
    "without SRWAB": lambda dim: _refilled(dim, nn.Identity(), HFERB(dim)),
    "average pooling": lambda dim: CRFB(_windows(dim), HFERB(dim, pool=partial(nn.AvgPool2d, 3, 1, 1)), HFB(dim)),
    "convolutions only": lambda dim: nn.Sequential(ConvPair(dim, 24), ConvPair(dim, 24)),
    "attention only": lambda dim: _windows(dim, 4),
}
# Unclipped, some seeds stay on a plateau half a decibel lower.
RECIPE = Recipe(epochs=5, batch_size=4, optimizer="adam", betas=(0.9, 0.99), lr=4e-3, schedule="onecycle", clip=0.1)
REMOVED = [10, 20, 30, 40, 50]


def small_network(block: str) -> CRAFT:
    """A network of two groups of one block, over bicubic interpolation."""
    return CRAFT(2, dim=DIM, groups=2, depth=1, block=BLOCKS[block], over_bicubic=True)


@cache
def _data(smoke: bool) -> TaskData:
    """Crops whose input is 16×16 pixels, the middle of the validation photograph; for a quick look one small piece."""
    data = TASK.load("photographs", patch=40, crops=2 if smoke else 48)
    if not smoke:
        return replace(data, val=Whole([data.val[0][:, 64:192, 64:192].permute(1, 2, 0).numpy()]))
    piece = Whole([data.test[0][:, :64, :64].permute(1, 2, 0).numpy()])
    return replace(data, val=piece, test=piece)


def _trained(run: Run, block: str) -> list[dict[str, Any]]:
    """Train one network a seed; what it scores on the test photographs."""
    data = _data(run.smoke)
    recipe = replace(RECIPE, epochs=1) if run.smoke else RECIPE

    def one(seed: int) -> dict[str, Any]:
        result = fit(partial(small_network, block), TASK, data, recipe, seed=seed, device=run.device, title=block)
        scores: dict[str, Any] = {**result.metrics, "curve": result.series("psnr"), "loss": result.series("train_loss")}
        with torch.no_grad():
            scores["high band"] = _mean(_high_band_error(result.model, photo) for photo in _photos(data))
            scores["drops"] = _drops(result.model, data)
        if seed == run.seeds[0] and block in ("CRAFT", "convolutions only"):
            name = "after_craft" if block == "CRAFT" else "after_convolutions"
            words = f"A piece of a test photograph: input, bicubic, {block} after {result.steps} steps, original."
            figure = before_and_after({block: result.model}, data.test[0])
            scores["picture"] = run.picture(name, figure, words).model_dump()
        return scores

    return run.trials(block, one, **_setting(recipe))


def _setting(recipe: Recipe = RECIPE) -> dict[str, Any]:
    return {
        "scale": 2,
        "dim": DIM,
        "groups": 2,
        "blocks a group": 1,
        "input patch": 16,
        "crops an epoch": 240,
        "epochs": recipe.epochs,
        "batch": recipe.batch_size,
        "optimizer": recipe.optimizer,
        "lr": recipe.lr,
        "schedule": recipe.schedule,
        "clip": recipe.clip,
        "output": "over bicubic interpolation (ours, for all alike)",
    }


def _mean(values: Any) -> float:
    kept = [float(v) for v in values]
    return sum(kept) / len(kept)


def _photos(data: TaskData) -> list[Tensor]:
    return [data.test[i] for i in range(len(data.test))]  # type: ignore[arg-type]


def _high_band_error(model: nn.Module, photo: Tensor) -> float:
    """|F(restored − original)|² / |F(original)|² above half the Nyquist radius, on Y."""
    lr, hr = reduced(photo, 2)
    original = luma(hr)
    high = _radius(original) > 0.25
    spectra = [torch.fft.fft2(y)[high].abs().square().sum() for y in (luma(restore(model, lr)) - original, original)]
    return (spectra[0] / spectra[1]).item()


def _radius(image: Tensor) -> Tensor:
    """Distance of each discrete frequency from zero, in cycles a pixel."""
    rows, columns = (torch.fft.fftfreq(side, device=image.device) for side in image.shape[-2:])
    return (rows[:, None] ** 2 + columns**2).sqrt()


def _without_highest(image: Tensor, percent: int) -> Tensor:
    """An 8-bit image without that share of its frequencies, those farthest from zero."""
    radius = _radius(image)
    kept = radius <= torch.quantile(radius.flatten(), 1 - percent / 100)
    return torch.fft.ifft2(torch.fft.fft2(image) * kept).real.round().clamp(0, 255)


def _drops(model: nn.Module, data: TaskData) -> list[float]:
    """PSNR in dB that is lost when the input loses its highest frequencies, for each share in `REMOVED`."""
    lost = []
    for photo in _photos(data):
        lr, hr = reduced(photo[:, :128, :128], 2)
        error = [
            (luma(restore(model, _without_highest(lr, percent))) - luma(hr))[2:-2, 2:-2].square().mean().log10()
            for percent in [0, *REMOVED]
        ]
        lost.append(10 * torch.stack(error[1:]) - 10 * error[0])
    return torch.stack(lost).mean(dim=0).tolist()


def _column(trials: list[dict[str, Any]], key: str) -> list[float]:
    return [t[key] for t in trials]


def _against(
    run: Run, key: str, system: str, baseline: str, unit: str, blocks: tuple[str, ...] = (), **more: Any
) -> Measurement:
    """One network against another over seeds, with a table of all that were trained."""
    shown = dict.fromkeys((system, baseline, *blocks))
    trials = {block: _trained(run, block) for block in shown}
    data = _data(run.smoke)
    rows: list[list[str | float | int | None]] = [
        [
            block,
            bench.count_parameters(small_network(block)),
            round(_mean(_column(t, "psnr")), 2),
            round(_mean(_column(t, "ssim")), 4),
            round(_mean(_column(t, "high band")), 3),
        ]
        for block, t in trials.items()
    ]
    return Measurement.paired(
        _column(trials[system], key),
        _column(trials[baseline], key),
        seeds=run.seeds,
        unit=unit,
        data=data.name,
        fingerprint=data.fingerprint,
        setting=_setting(),
        tables=[
            Table(
                caption=f"Test photographs, mean of {len(run.seeds)} seeds",
                columns=["network", "parameters", "PSNR-Y (dB)", "SSIM-Y", "error above half Nyquist"],
                rows=rows,
            )
        ],
        **more,
    )


def _curves(run: Run, blocks: tuple[str, ...], key: str, **axes: Any) -> list[Series]:
    """The mean over seeds of a list of numbers, and its spread."""
    lines = []
    for block in blocks:
        rows = [trial[key] for trial in _trained(run, block)]
        lines.append(Series.over_seeds(block, REMOVED if key == "drops" else range(1, len(rows[0]) + 1), rows, **axes))
    return lines


@measures("beats_bicubic")
def beats_bicubic(run: Run) -> Measurement:
    trials = _trained(run, "CRAFT")
    data = _data(run.smoke)
    ours, bicubic = _column(trials, "psnr"), _column(trials, "psnr_bicubic")
    kinds = ("CRAFT", "convolutions only")
    pictures = [t["picture"] for block in kinds for t in _trained(run, block) if "picture" in t]
    return Measurement.paired(
        ours,
        bicubic,
        seeds=run.seeds,
        unit="dB PSNR-Y",
        data=data.name,
        fingerprint=data.fingerprint,
        setting=_setting(),
        pictures=pictures,
        series=_curves(run, kinds, "curve", plot="validation", x_label="epoch", y_label="PSNR-Y (dB)"),
        tables=[
            Table(
                caption="Test photographs",
                columns=["", "PSNR-Y (dB)", "SSIM-Y"],
                rows=[
                    ["bicubic", round(_mean(bicubic), 2), round(_mean(_column(trials, "ssim_bicubic")), 4)],
                    ["CRAFT, small", round(_mean(ours), 2), round(_mean(_column(trials, "ssim")), 4)],
                ],
            )
        ],
    )


@measures("beats_convolution")
def beats_convolution(run: Run) -> Measurement:
    return _against(run, "psnr", "CRAFT", "convolutions only", "dB PSNR-Y", ("attention only",))


@measures("high_frequency_prior")
def high_frequency_prior(run: Run) -> Measurement:
    return _against(run, "psnr", "CRAFT", "without HFERB", "dB PSNR-Y", ("without SRWAB",))


@measures("prior_in_high_band")
def prior_in_high_band(run: Run) -> Measurement:
    return _against(
        run, "high band", "CRAFT", "without HFERB", "relative error energy above half Nyquist", ("without SRWAB",)
    )


@measures("global_branch")
def global_branch(run: Run) -> Measurement:
    return _against(run, "psnr", "CRAFT", "without SRWAB", "dB PSNR-Y")


@measures("max_pooling")
def max_pooling(run: Run) -> Measurement:
    return _against(run, "psnr", "CRAFT", "average pooling", "dB PSNR-Y")


@measures("transformers_rely_less_on_high_frequencies")
def transformers_rely_less_on_high_frequencies(run: Run) -> Measurement:
    """Loss of PSNR when the input loses its highest frequencies, averaged over the shares that are removed."""
    kinds = ("convolutions only", "attention only", "CRAFT")
    drops = {block: [_mean(t["drops"]) for t in _trained(run, block)] for block in kinds}
    data = _data(run.smoke)
    return Measurement.paired(
        drops["convolutions only"],
        drops["attention only"],
        seeds=run.seeds,
        unit="dB PSNR-Y lost",
        data=data.name,
        fingerprint=data.fingerprint,
        note="A network that restores less has less to lose: read the drops beside the PSNR of each network.",
        setting={**_setting(), "removed": f"{REMOVED} % of the frequencies of the input, the highest first"},
        series=_curves(
            run,
            kinds,
            "drops",
            plot="high frequencies removed",
            x_label="% of the input's frequencies removed",
            y_label="PSNR-Y lost (dB)",
        ),
    )


# Fewer bits: plain rounding of a trained network


class Rounded:
    """Rounds weights and inputs of every convolution and linear layer of a network in place, uniformly.

    w ← s·round(w/s) with s = max|w| / (2^(b−1) − 1) for each output channel; x ← lo + t·round((x − lo)/t), clamped,
    with t = (hi − lo) / (2^b − 1) and [lo, hi] what the layer was given in calibration. Sums stay in floating point.

    Args:
        model: the network, in eval mode.
        calibration: inputs that show each layer its range.
    """

    def __init__(self, model: nn.Module, calibration: list[Tensor]):
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.ranges: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        seen = [layer.register_forward_pre_hook(self._see) for layer in layers]
        with torch.no_grad():
            for x in calibration:
                model(x)
        for handle in seen:
            handle.remove()
        self.weights = {layer: layer.weight.detach().clone() for layer in self.ranges}  # type: ignore[operator]
        self.bits: int | None = None
        for layer in self.ranges:
            layer.register_forward_pre_hook(self._round)

    def to(self, bits: int) -> None:
        """Take so many bits from now on."""
        self.bits = bits
        for layer, weight in self.weights.items():
            step = weight.flatten(1).abs().amax(dim=1).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            step = step.view(-1, *[1] * (weight.dim() - 1))
            layer.weight.data = step * (weight / step).round()  # type: ignore[union-attr]

    def _see(self, layer: nn.Module, given: tuple[Tensor]) -> None:
        low, high = given[0].aminmax()
        before = self.ranges.get(layer, (low, high))
        self.ranges[layer] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    def _round(self, layer: nn.Module, given: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.bits is None:
            return None
        low, high = self.ranges[layer]
        step = (high - low).clamp_min(1e-12) / (2**self.bits - 1)
        return (low + step * ((given[0].clamp(low, high) - low) / step).round(),)


BITS = (8, 6, 4)


def _rounded(run: Run) -> list[dict[str, float]]:
    """Train CRAFT once a seed; PSNR in full precision and in fewer bits, and of bicubic interpolation."""
    data = _data(run.smoke)
    recipe = replace(RECIPE, epochs=1) if run.smoke else RECIPE
    crops = 2 if run.smoke else 16

    def one(seed: int) -> dict[str, float]:
        result = fit(
            partial(small_network, "CRAFT"), TASK, data, recipe, seed=seed, device=run.device, title="to be rounded"
        )
        torch.manual_seed(seed)
        inputs = [reduced(data.train[i % len(data.train)], 2)[0][None, :, :16, :16] / 255 for i in range(crops)]  # type: ignore[arg-type]
        rounded = Rounded(result.model, [x.to(run.device) for x in inputs])
        scores = {"full": result.metrics["psnr"], "bicubic": result.metrics["psnr_bicubic"]}
        for bits in BITS:
            rounded.to(bits)
            with torch.no_grad():
                scores[f"{bits}"] = TASK.evaluate(result.model, data.test)["psnr"]
        return scores

    return run.trials("CRAFT in fewer bits", one, **_rounding_setting(recipe, crops))


def _rounding_setting(recipe: Recipe = RECIPE, crops: int = 16) -> dict[str, Any]:
    return {
        **_setting(recipe),
        "weights": "symmetric, a step for each output channel",
        "activations": f"inputs of convolutions and linear layers, least to largest of {crops} training crops",
        "not rounded": "sums, products inside attention, normalisations, the interpolation",
    }


def _in_bits(run: Run, bits: int) -> Measurement:
    trials = _rounded(run)
    data = _data(run.smoke)
    names = {"full": "32 bits, floating point", **{f"{b}": f"{b} bits" for b in BITS}, "bicubic": "bicubic"}
    return Measurement.paired(
        _column(trials, f"{bits}"),
        _column(trials, "full"),
        seeds=run.seeds,
        unit="dB PSNR-Y",
        data=data.name,
        fingerprint=data.fingerprint,
        setting=_rounding_setting(),
        note="Two blocks over an interpolation that is not rounded forgive more than the published network can.",
        tables=[
            Table(
                caption=f"Test photographs, weights and activations in fewer bits, mean of {len(run.seeds)} seeds",
                columns=["precision", "PSNR-Y (dB)"],
                rows=[[name, round(_mean(_column(trials, key)), 2)] for key, name in names.items()],
            )
        ],
    )


@measures("plain_rounding_8")
def plain_rounding_8(run: Run) -> Measurement:
    return _in_bits(run, 8)


@measures("plain_rounding_6")
def plain_rounding_6(run: Run) -> Measurement:
    return _in_bits(run, 6)


@measures("plain_rounding_4")
def plain_rounding_4(run: Run) -> Measurement:
    return _in_bits(run, 4)
