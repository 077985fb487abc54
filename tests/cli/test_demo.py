"""``commfuse demo``: right when it is right, and wrong when anything is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from commfuse.cli.demo import layer as parts
from commfuse.cli.demo import one_process, rank, verdict
from commfuse.cli.demo.layer import HIDDEN, TOP_K, Gated, Layer

from .commands import alone, here

SMALL = ("demo", "--ranks", "2", "--tokens", "3", "--experts", "10")


@pytest.mark.parametrize(
    ("options", "rows", "backend"),
    [([], "bfloat16", "portable"), (["--quant"], "int8", "portable"), ([], "bfloat16", "reference")],
)
def test_two_ranks(capsys: pytest.CaptureFixture[str], options: list[str], rows: str, backend: str) -> None:
    outcome = here(capsys, *SMALL, *options, "--backend", backend, "--json")
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)
    assert found["passed"] is True
    assert (found["rows"], found["backend"], found["transport"]) == (rows, backend, "gloo")
    assert (found["ranks"], found["experts"], found["hidden"], found["top_k"]) == (2, 10, 7168, 8)
    assert [sum(row) for row in found["rows_sent"]] == [3 * TOP_K] * 2
    assert sum(found["rows_per_expert"][:5]) == sum(row[0] for row in found["rows_sent"])
    assert len(found["rows_per_expert"]) == 10
    assert sum(found["rows_per_expert"]) == 6 * TOP_K
    assert set(found["seconds"]) == {"router", "dispatch", "experts", "shared expert", "combine"}
    assert all(of["slowest"] >= of["mean"] > 0 for of in found["seconds"].values())
    _check_traffic(found)
    compared = found["comparison"]
    assert compared["tokens"] == compared["tokens_within"] == 6
    assert compared["other_choice"] == 0
    assert 0.3 < compared["closest"] <= 1, "the bound is tight, and what is compared is not the same thing twice"
    assert (found["int8"] is not None) == (rows == "int8")
    if found["int8"]:
        assert 0.003 < found["int8"]["largest"] < found["int8"]["bound_there"] < 0.05


def _check_traffic(found: dict[str, Any]) -> None:
    away = found["rows_sent"][0][1] + found["rows_sent"][1][0]
    for name, row_bytes in {"dispatch": 7172 if found["rows"] == "int8" else 14336, "combine": 14336}.items():
        moved = found["traffic"][name]
        assert (moved["rows"], moved["rows_between_ranks"]) == (48, away)
        assert (moved["bytes"], moved["bytes_between_ranks"]) == (48 * row_bytes, away * row_bytes)


def test_piped_output_is_plain() -> None:
    outcome = alone(*SMALL, "--quant", "--backend", "portable", COLUMNS="80")
    assert (outcome.code, outcome.err) == (0, "")
    assert "\x1b" not in outcome.out
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    for words in ("over 2 processes", "int8 rows", "backend portable over gloo", "6 of 6 tokens", "allowed there", "rank 1"):
        assert words in outcome.out
    assert outcome.out.splitlines()[-1].startswith("passed after ")


def test_a_refusal_of_the_ranks_is_printed_once() -> None:
    outcome = alone(*SMALL, COMMFUSE_PRODUCT="A2")
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith(
        "commfuse demo: npu_moe_distribute_dispatch_v2: refused under the rules of A2 on all 2 ranks:\n"
    )
    assert "Traceback" not in outcome.err
    assert outcome.err.count("refused") == 1


def test_a_wrong_expert_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert's output is 5 % larger in the one process than on the ranks."""
    true_weights = parts.gated_weights

    def altered(layer: Layer, name: str) -> Gated:
        weights = true_weights(layer, name)
        return replace(weights, down=weights.down * 1.05) if name == "expert 2" else weights

    monkeypatch.setattr(parts, "gated_weights", altered)
    outcome = here(capsys, *SMALL)
    assert outcome.code == 1
    assert "FAILED" in outcome.out
    assert "passed" not in outcome.out


def test_another_choice_of_experts_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    true_router = parts.router_weight
    monkeypatch.setattr(parts, "router_weight", lambda layer: true_router(layer).roll(1, 0))
    outcome = here(capsys, *SMALL, "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 1
    assert found["passed"] is False
    assert found["comparison"]["other_choice"] > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ranks", "0"], "argument --ranks: must be in 1..32, not 0"),
        (["--ranks", "3", "--experts", "32"], "32 experts do not divide among 3 ranks; take 30 or 33"),
        (["--ranks", "16", "--experts", "8"], "8 experts do not divide among 16 ranks; take 16"),
        (["--experts", "7"], "argument --experts: must be in 8..256, not 7"),
        (["--tokens", "0"], "argument --tokens: must be in 1..512, not 0"),
        (["--ranks", "32", "--tokens", "200"], "32 ranks of 200 tokens are more than 2048 tokens in all; take fewer"),
        (["--backend", "cpv"], "argument --backend: invalid choice: 'cpv' (choose from"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], options: list[str], sentence: str) -> None:
    outcome = here(capsys, "demo", *options)
    assert outcome.code == 2
    assert outcome.err.startswith(f"commfuse demo: {sentence}")
    assert outcome.err.count("\n") == 1


LAYER = Layer(ranks=2, tokens=2, experts=8, int8_rows=True, seed=3)


@pytest.fixture(scope="module")
def whole() -> one_process.Whole:
    return one_process.compute(LAYER)


def _reports(whole: one_process.Whole, out: torch.Tensor, ids: torch.Tensor | None = None) -> list[rank.Report]:
    """Reports as ranks would send them, had they computed ``out``."""
    ids = whole.expert_ids if ids is None else ids
    return [
        rank.Report(
            backend="none",
            transport="none",
            out=out[i : i + 2],
            expert_ids=ids[i : i + 2],
            rows_per_expert=[],
            rows_per_source=[],
        )
        for i in (0, 2)
    ]


def _judge(whole: one_process.Whole, out: torch.Tensor) -> verdict.Verdict:
    return verdict.judge(LAYER, _reports(whole, out), whole)


def test_the_rounded_result_passes(whole: one_process.Whole) -> None:
    found = _judge(whole, whole.as_sent.out.bfloat16())
    assert found.passed
    assert found.difference.closest <= 0.5


def test_every_other_token_or_number_fails(whole: one_process.Whole) -> None:
    right = whole.as_sent.out.bfloat16()
    swapped = right[[0, 1, 3, 2]]
    nan = right.clone()
    nan[1, 5] = torch.nan
    off = right.clone()
    off[3, HIDDEN - 1] += 0.2
    for out, within in ((swapped, 2), (nan, 3), (off, 3), (torch.zeros_like(right), 0), (right * 1.02, 0)):
        found = _judge(whole, out)
        assert not found.passed
        assert found.difference.tokens_within == within
    place = _judge(whole, off).difference
    assert (place.rank, place.token, place.column) == (1, 1, HIDDEN - 1)
    assert place.largest == pytest.approx(0.2, rel=0.05)


def test_rows_that_were_not_quantised_fail(whole: one_process.Whole) -> None:
    """The bound tells int8 rows from exact ones, so it would also tell a wrong factor."""
    assert whole.unquantised is not None
    assert not _judge(whole, whole.unquantised.out.bfloat16()).passed


def test_one_process_is_the_formula(whole: one_process.Whole) -> None:
    """Token 3, choice after choice, written once more."""
    assert whole.unquantised is not None
    x = parts.token_rows(LAYER, 1)[1].double()
    scores = torch.sigmoid(parts.router_weight(LAYER) @ x)
    out = torch.zeros(HIDDEN, dtype=torch.float64)
    for name, weight in [*((parts.expert_name(i), score / scores.sum()) for i, score in enumerate(scores)), (parts.SHARED, 1.0)]:
        mlp = parts.gated_weights(LAYER, name)
        gate, up = mlp.gate.double() @ x, mlp.up.double() @ x
        out += weight * (mlp.down.double() @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(whole.unquantised.out[3], out)


def test_tokens_come_from_the_text() -> None:
    layer = replace(LAYER, tokens=16)
    assert parts.words(layer, 0)[:7] == ["how", "tokens", "travel", "a", "token", "enters", "the"]
    assert parts.words(layer, 1)[0] == parts.words(replace(layer, tokens=17), 0)[16]
    assert len(parts.words(replace(layer, tokens=4096), 1)) == 4096
    words, rows = parts.words(layer, 0), parts.token_rows(layer, 0).float()
    same, other = words.index("a"), [i for i, word in enumerate(words) if word == "a"][1]
    alike = torch.nn.functional.cosine_similarity(rows[same], rows, dim=1)
    assert alike[other] > 0.9
    assert all(alike[i] < 0.3 for i, word in enumerate(words) if word != "a")
    assert rows.square().mean(1).sqrt().tolist() == pytest.approx([1] * 16, rel=0.01)
