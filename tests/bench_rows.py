"""Made-up rows of results, for the tests of the reports."""

from typing import Any
from xml.etree import ElementTree

from bench.report.rows import Row

SVG = "{http://www.w3.org/2000/svg}"
LOSSES = [0.6931, 0.66, 0.71, 0.62]


def row(provider: str, repetition: int = 0, speed: float = 1.0, **more: Any) -> Row:
    """A repetition of a trainer; `case` adds to the case, `error` takes the figures away."""
    case = {"model": "tiny-llama", "data": "gsm8k", "pairs_per_step": 8, "steps": 4, "warm_up": 2}
    case |= {"dtype": "fp32", "lora": False, "gradient_checkpointing": False}
    case |= {"reference": "precomputed", "learning_rate": 1e-5, **more.pop("case", {})}
    made = {"kind": "measurement", "case": case, "provider": provider, "repetition": repetition}
    made |= {"device": "a CPU, 2 threads", "commit": "abc1234", "date": "2026-11-21"}
    made |= {"command": "python /a/b/fastdpo bench --steps 4", "versions": {"trl": "1.16.0"}}
    if "error" not in more:
        made |= {"pairs_per_s": speed, "useful_tokens_per_s": 900 * speed, "peak_mib": 1000.0}
        made |= {"computed_tokens_per_s": 300 * speed, "mfu": 0.123, "loss": LOSSES}
        made |= {"grad_norm": [2.0] * 4, "settings": {"batch": 4, "attention": "sdpa"}}
    return made | more


def speeds(provider: str, *figures: float, **more: Any) -> list[Row]:
    """Repetitions of a trainer that are as fast as this."""
    return [row(provider, i, speed, **more) for i, speed in enumerate(figures)]


def a_run() -> list[Row]:
    """Of five trainers: one is refused, two failed."""
    return [
        *speeds("trl", 1.0, 1.2, 1.1),
        *speeds("fastdpo", 5.0, 5.5, 6.0, peak_mib=600.0),
        *speeds("wrong", 9.1, 9.2, 9.3, loss=[0.6931, 0.66, 0.69, 0.62]),
        row("trl-flash", error="NotInstalled: no flash-attn"),
        row("big", error="OutOfMemory: 9 GiB | asked"),
    ]


def evaluations() -> list[Row]:
    """Of both trainers at four steps."""
    curves = {"fastdpo": [0.4, 0.5, 0.8, 0.9], "trl": [0.0, 0.5, 0.75, 0.9]}
    case = {"model": "llama", "data": "texts", "eval_pairs": 48}
    facts = ("device", "commit", "date", "command")
    return [
        {"case": case, "provider": provider, "step": 10 * step, "eval": figures}
        | {name: row("trl")[name] for name in facts}
        for provider, curve in curves.items()
        for step, accuracy in enumerate(curve)
        for figures in [{"accuracy": accuracy, "margin": accuracy - 0.5, "loss": 0.69}]
    ]


def head_rows(tokens: int = 16, **keep: Any) -> list[Row]:
    """Three repetitions of three heads, and one that could not be imported."""
    case = {"regime": "dpo", "head": "tiny", "vocab": 331, "hidden": 48, "tokens": tokens}
    case |= {"dtype": "fp32", "workspace_limit_mib": 512}
    common = {"case": case, "device": "a CPU", "commit": "1", "command": "c", **keep}
    facts = {"workspace_mib": 400.0, "gradient_mib": 2.0, "deterministic": True}
    times = {"fastdpo": (3.0, 2.0, 4.0), "products": (2.0, 2.0, 2.5), "trl": (6.0, 7.0, 5.0)}
    rows = [
        {"provider": name, "forward_s": 1.0, "total_s": total, **facts, **common}
        for name, totals in times.items()
        for total in totals
    ]
    return [*rows, {"provider": "cce", "error": "ImportError: no", **common}]


def texts(svg: str) -> list[str]:
    """What can be read in a chart."""
    elements = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return [" ".join(" ".join(each.itertext()).split()) for each in elements]
