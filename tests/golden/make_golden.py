"""Golden vectors of docs/numerics.md: one JSON file per level set, written beside this script.

    python tests/golden/make_golden.py [folder]

Written from the contract alone: standard library only, nothing of fairseq_lowbit, no torch. All
arithmetic is on exact fractions; a number is rounded once, to float64, when it is written (and
1/sqrt(N Qp), which is irrational, is a float64 factor).

Codes must be *equal* in fp32, ties and clip edges included, so u = (x - beta)/alpha must be the
same number there. Inputs are therefore made backwards: u is a multiple of 1/16, alpha, beta and the
origin o have few significant bits, the length ratio is a dyadic number, and
x = u * alpha + beta + o. Every intermediate value (alpha and beta times the ratio, beta + o, x,
x - (beta + o)) is checked to be an fp32 number; then fp32's subtraction is exact and its division,
correctly rounded, returns u itself. Where frames have a scale of their own, every frame is filled
up to a mean magnitude that is the ratio.
"""

import json
import math
import struct
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

SETS = [("sign", 1)]
SETS += [("signed", bits) for bits in range(2, 9)]
SETS += [("non_negative", bits) for bits in range(1, 9)]
SETS += [("mid_rise", bits) for bits in range(1, 9)]
REFERENCE_FRAMES = 500
RANGES = (Fraction(3, 16), Fraction(5, 4))
# The lowest values of GELU and SiLU, as docs/numerics.md rounds them.
ORIGINS = {"gelu": Fraction(-87, 512), "silu": Fraction(-143, 512)}
Rows = list[list[Fraction]]


def exact(value: Fraction) -> Fraction:
    """The fraction itself, refused unless fp32 holds it."""
    single = struct.unpack("f", struct.pack("f", float(value)))[0]
    if Fraction(single) != value:
        raise ValueError(f"{value} is no fp32 number")
    return value


def code_range(kind: str, bits: int) -> tuple[int, int]:
    if kind == "sign":
        return -1, 1
    if kind == "signed":
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def clip_range(kind: str, bits: int) -> tuple[int, int]:
    """Of u; outside no gradient passes."""
    return (-1, 1) if kind == "mid_rise" else code_range(kind, bits)


def level(code: int, kind: str, bits: int) -> Fraction:
    """What a code stands for, in units of alpha."""
    return Fraction(2 * code + 1, 2**bits) - 1 if kind == "mid_rise" else Fraction(code)


def divisor(kind: str, bits: int) -> int:
    """Qp."""
    if kind == "mid_rise":
        return 2 ** (bits - 1)
    return 1 if kind == "sign" else code_range(kind, bits)[1]


def encode(u: Fraction, kind: str, bits: int) -> int:
    if kind == "sign":
        return 1 if u >= 0 else -1
    if kind == "non_negative" and bits == 1:
        return 1 if u >= Fraction(1, 2) else 0
    lo, hi = code_range(kind, bits)
    if kind == "mid_rise":
        return min(max(math.floor((u + 1) * 2 ** (bits - 1)), lo), hi)
    return min(max(round(u), lo), hi)  # round() of a fraction rounds ties to even


def interesting(kind: str, bits: int) -> list[Fraction]:
    """Normalised inputs: zeros, ties, clip edges and both their sides, the inside, far beyond."""
    if kind == "mid_rise":
        return interesting_mid_rise(bits)
    lo, hi = clip_range(kind, bits)
    half, step = Fraction(1, 2), Fraction(1, 16)
    middle = Fraction(lo + hi + 1, 2)
    us = [Fraction(0), step, -step]
    us += [k + half for k in (lo - 1, lo, 0, 1, math.floor(middle), hi - 1, hi)]
    us += [-half, -half - step, half - step, half + step]
    us += [edge + side for edge in (lo, hi) for side in (0, -step, step, -half - step, half + step)]
    us += [middle + 5 * step, middle - 3 * step, Fraction(lo) - 1000, Fraction(hi) + 1000]
    return list(dict.fromkeys(us))


def interesting_mid_rise(bits: int) -> list[Fraction]:
    """Thresholds, levels, edges and both their sides; here u's grid is finer than 1/16."""
    width, near = Fraction(2, 2**bits), Fraction(1, 2 ** (bits + 3))
    codes = {0, 1, 2**bits // 2, 2**bits - 1} & set(range(2**bits))
    centers = [Fraction(0), Fraction(-1), Fraction(1)]
    for code in sorted(codes):
        centers += [code * width - 1, level(code, "mid_rise", bits)]
    us = [center + side for center in centers for side in (0, -near, near)]
    us += [Fraction(-9, 8), Fraction(9, 8), Fraction(-1000), Fraction(1000)]
    return list(dict.fromkeys(us))


def gradients(count: int) -> list[Fraction]:
    """Upstream gradients: multiples of 1/8 of both signs, none of them zero."""
    return [Fraction((index * 7) % 17 - 8 or 9, 8) for index in range(count)]


def case(
    name: str,
    kind: str,
    bits: int,
    us: Rows,
    alpha: list[Fraction],
    beta: list[Fraction] | None,
    ratio: list[Fraction] | None,
    gradient_values: int,
    origin: Fraction = Fraction(0),
) -> dict[str, Any]:
    """One golden case.

    ``us`` is a list of rows; ``alpha`` and ``ratio`` have one value per row or one in all,
    ``beta`` one per column, one in all, or is None. alpha * ratio and beta * ratio are what
    u is computed with; gradients are those of the stored alpha and beta.
    """
    lo, hi = clip_range(kind, bits)
    rows, columns = len(us), len(us[0])
    flat_g = gradients(rows * columns)
    g = [flat_g[r * columns : (r + 1) * columns] for r in range(rows)]
    x, codes, decoded, dx = ([[] for _ in range(rows)] for _ in range(4))
    dalpha = [Fraction(0)] * len(alpha)
    dbeta = [Fraction(0)] * len(beta or [])
    for r in range(rows):
        scale_ratio = ratio[r] if ratio else Fraction(1)
        a = r % len(alpha)
        scale = exact(alpha[a] * scale_ratio)
        for c in range(columns):
            u, gradient = us[r][c], g[r][c]
            b = c % len(beta) if beta else 0
            shift = exact(exact(beta[b] * scale_ratio) + origin) if beta else Fraction(0)
            x[r].append(exact(exact(u * scale) + shift))
            code = encode(u, kind, bits)
            inside = lo <= u <= hi
            codes[r].append(code)
            value = level(code, kind, bits)
            decoded[r].append(exact(exact(scale * value) + origin))
            dx[r].append(gradient if inside else Fraction(0))
            slope = value - u if inside and kind != "sign" else value
            dalpha[a] += gradient * slope * scale_ratio
            if beta:
                dbeta[b] -= dx[r][c] * scale_ratio
    factor = 1 / math.sqrt(gradient_values * divisor(kind, bits))
    result = {
        "name": name,
        **({"origin": numbers(origin)} if origin else {}),
        "x": numbers(x),
        "alpha": numbers(alpha),
        "beta": numbers(beta) if beta else None,
        "ratio": numbers(ratio) if ratio else None,
        "gradient_values": gradient_values,
        "gradient_factor": factor,
        "g": numbers(g),
        "codes": codes,
        "decoded": numbers(decoded),
        "dx": numbers(dx),
        "dalpha_sum": numbers(dalpha),
        "dalpha": [float(d) * factor for d in dalpha],
        "dbeta_sum": numbers(dbeta) if beta else None,
        "dbeta": [float(d) * factor for d in dbeta] if beta else None,
    }
    if beta is None and any(0 in row for row in us):
        # The first zero becomes -0.0, whose code is that of 0.
        row = next(r for r in range(rows) if 0 in us[r])
        result["x"][row][us[row].index(0)] = -0.0
    return result


def numbers(values: Any) -> Any:
    """Fractions, in lists of any depth, to float64."""
    if isinstance(values, list):
        return [numbers(value) for value in values]
    return float(values)


def cases(kind: str, bits: int) -> Iterator[dict[str, Any]]:
    us = interesting(kind, bits)
    fine, coarse = Fraction(3, 16), Fraction(5, 4)
    yield case("per_tensor", kind, bits, [[Fraction(0), *us]], [fine], None, None, 24)
    negative, positive = [Fraction(-11, 32)], [Fraction(7, 8)]
    yield case("negative_shift", kind, bits, [us], [fine], negative, None, 24)
    yield case("positive_shift", kind, bits, [us], [coarse], positive, None, 24)
    rows = [us[::2], us[1::2]]
    width = min(map(len, rows))
    rows = [row[:width] for row in rows]
    weight = [[Fraction(0), *rows[0]], [Fraction(0), *rows[1]]]
    yield case("per_channel_scale", kind, bits, weight, [fine, coarse], None, None, width + 1)
    betas = [Fraction(c - 5, 8) for c in range(width)]
    yield case("per_channel_shift", kind, bits, rows, [coarse], betas, None, width)
    if kind == "non_negative":
        # 400 valid frames have ratio 5/4, 160 have 25/8.
        ratios = [Fraction(REFERENCE_FRAMES, frames) for frames in (400, 160)]
        alpha, beta = [Fraction(3, 256)], [Fraction(-1, 512)]
        yield case("length_scaled", kind, bits, rows, alpha, beta, ratios, 12 * REFERENCE_FRAMES)
        for function, origin in ORIGINS.items():
            yield case(function, kind, bits, [us], [fine], negative, None, 24, origin)
    if kind in ("sign", "signed"):
        yield per_frame_case(kind, bits, rows)


def per_frame_case(kind: str, bits: int, rows: Rows) -> dict[str, Any]:
    """Scale and shift in units of each frame's mean magnitude, which is the ratio. A frame is
    filled up to a power of two, for an exact mean, and ends with the value that gives it this mean:
    far above the highest level."""
    alpha, beta = Fraction(3, 2 ** (bits + 3)), Fraction(-1, 32)
    ratios, features = [Fraction(4), Fraction(1, 2)], 16
    frames = []
    for row in rows:
        us = [u for u in row if abs(u) < 500]
        us += [Fraction(0)] * (features - 1 - len(us))
        # In units of the ratio, so that the mean magnitude is 1.
        last = features - sum(abs(u * alpha + beta) for u in us)
        frames.append([*us, (last - beta) / alpha])
    return case("per_frame", kind, bits, frames, [alpha], [beta], ratios, features)


def dump(kind: str, bits: int) -> str:
    """The golden file of one level set."""
    lo, hi = code_range(kind, bits)
    head = f' "kind": "{kind}", "bits": {bits}, "lo": {lo}, "hi": {hi},\n'
    return "{\n" + head + ' "cases": ' + listed(cases(kind, bits)) + "\n}\n"


def listed(blocks: Iterable[dict[str, Any]]) -> str:
    """JSON with one array per line, so that a change shows in a diff."""
    texts = []
    for values in blocks:
        lines = [f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        texts.append("  {\n" + ",\n".join(lines) + "\n  }")
    return "[\n" + ",\n".join(texts) + "\n ]"


def squashed_case(bits: int) -> dict[str, Any]:
    """Squashed weights: tanh in float64, at inputs whose tanh no fp32 rounding carries over a
    threshold; two channels with their gains."""
    log_gains = [-1.5, 0.25]
    x = [[(7 * c + 3 * r - 40) / 16 for c in range(12)] for r in range(2)]
    g = [[float(value) for value in gradients(24)[r * 12 : (r + 1) * 12]] for r in range(2)]
    codes, decoded, dx = ([[] for _ in range(2)] for _ in range(3))
    dlog_gain = [0.0, 0.0]
    for r, log_gain in enumerate(log_gains):
        gain = math.exp(log_gain)
        for value, gradient in zip(x[r], g[r], strict=True):
            squashed = math.tanh(value)
            position = (squashed + 1) * 2 ** (bits - 1)
            if value and abs(position - round(position)) < 1e-4 < 2**bits - position:
                raise ValueError(f"tanh({value}) is too close to a threshold of {bits} bits")
            code = min(math.floor(position), 2**bits - 1)
            codes[r].append(code)
            decoded[r].append(gain * float(level(code, "mid_rise", bits)))
            dx[r].append(gradient * gain * (1 - squashed**2))
            dlog_gain[r] += gradient * decoded[r][-1]
    return {
        "bits": bits,
        "x": x,
        "log_gain": log_gains,
        "g": g,
        "codes": codes,
        "decoded": decoded,
        "dx": dx,
        "dlog_gain": dlog_gain,
    }


def uniform_case(kind: str, bits: int) -> dict[str, Any]:
    """Plain quantizers with a range of their own per row. The ranges are multiples of the levels,
    so that scales are fp32 numbers and ties are met exactly."""
    rows = [[exact(scale * u) for u in uniform_inputs(kind, bits)] for scale in RANGES]
    codes, decoded, scales, zeros = [], [], [], []
    for row in rows:
        scale, zero = uniform_range(row, kind, bits)
        row_codes = [uniform_code(value / scale, zero, kind, bits) for value in row]
        codes.append(row_codes)
        decoded.append([exact(scale * (code - zero)) for code in row_codes])
        scales.append(exact(scale))
        zeros.append(zero)
    return {
        "kind": kind,
        "bits": bits,
        "x": numbers(rows),
        "scale": numbers(scales),
        "zero_point": zeros,
        "codes": codes,
        "decoded": numbers(decoded),
    }


def uniform_inputs(kind: str, bits: int) -> list[Fraction]:
    """In units of the scale: some levels, the ends, ties and both their sides."""
    if kind == "absmax" and bits == 1:
        return [Fraction(u, 8) for u in (0, 1, -1, 16, -16, 4, -4, 22)]  # mean magnitude 1
    steps = 2 ** (bits - 1) - 1 if kind == "absmax" else 2**bits - 1
    units = [0, 1, -1, steps] if kind == "absmax" else [0, 1, steps - steps // 3, -(steps // 3)]
    ties = [Fraction(unit) + Fraction(side, 8) for unit in units[:3] for side in (4, 3, 5)]
    return [*map(Fraction, units), *(u for u in ties if min(units) <= u <= max(units))]


def uniform_range(row: list[Fraction], kind: str, bits: int) -> tuple[Fraction, int]:
    """Scale and zero point."""
    if kind == "absmax" and bits == 1:
        return sum(map(abs, row)) / len(row), 0
    if kind == "absmax":
        return max(map(abs, row)) / (2 ** (bits - 1) - 1), 0
    low, high = min(*row, Fraction(0)), max(*row, Fraction(0))
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def uniform_code(u: Fraction, zero: int, kind: str, bits: int) -> int:
    if kind == "absmax" and bits == 1:
        return 1 if u >= 0 else -1
    lo, hi = code_range("signed" if kind == "absmax" else "non_negative", bits)
    return min(max(round(u) + zero, lo), hi)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    files = {
        "sign.json" if kind == "sign" else f"{kind}_{bits}.json": dump(kind, bits)
        for kind, bits in SETS
    }
    files["squashed.json"] = listed(map(squashed_case, range(1, 9))) + "\n"
    plain = [(kind, bits) for kind in ("absmax", "minmax") for bits in range(1, 9)]
    files["uniform.json"] = listed(uniform_case(*case) for case in plain) + "\n"
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("ascii"))


if __name__ == "__main__":
    main()
