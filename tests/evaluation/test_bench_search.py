"""The benchmark behind the tables of searches: nested pools, what is kept, what is not run again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_search


def pool(case: str, rewards: list[float]) -> dict[str, Any]:
    count = len(rewards)
    return {"method": "pool", "units": 32, "id": case, "caption": case, "rewards": rewards, "second": rewards[::-1],
            "right": [r > 5 for r in rewards], "evaluations": 60 * count, "decodes": count, "reward_calls": count,
            "seconds": 32.0, "plain_seconds": 0.5}  # fmt: skip


def test_one_pool_tells_every_best_of_n() -> None:
    rewards = [float((7 * i) % 31) for i in range(32)]
    table = bench_search.by_method([pool("7-a", rewards)])
    assert {n for _, n in table} == {1, 2, 4, 8, 16, 32}
    for n in (1, 2, 4, 8, 16, 32):
        row, best = table["best of N", n]["7-a"], max(rewards[:n])
        k = rewards.index(best)
        assert row["rewards"] == [best] and row["second"] == [rewards[::-1][k]] and row["right"] == [best > 5]
        assert (row["evaluations"], row["decodes"], row["seconds"]) == (60 * n, n, float(n))


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Killed within a line, it goes on with that line's case; other settings are other records."""
    cases = bench_search.held_out(1, 6)[:2]
    monkeypatch.setattr(bench_search, "cases_of", lambda development: [c | {"id": f"{c['id']}-0", "seed": 0} for c in cases])
    monkeypatch.setattr(bench_search, "kept", lambda name: [])
    monkeypatch.setattr(bench_search, "plain_seconds", lambda pipe: 1.0)
    monkeypatch.setitem(bench_search.STEPS_OF, "halving", 4)

    def records() -> list[dict[str, Any]]:
        return list(bench_search.read(tmp_path, True))

    bench_search.run(tmp_path, ["halving"], [2], (0, 1), True)
    first = records()
    assert len(first) == 2 and all(r["evaluations"] <= 2 * bench_search.PLAIN for r in first)
    file = next(tmp_path.glob("*.jsonl"))
    bench_search.run(tmp_path, ["halving"], [2], (0, 1), True)
    assert records() == first and len(file.read_text().splitlines()) == 2
    file.write_text(file.read_text()[:-40])  # the second line, cut
    assert len(records()) == 1
    other = tmp_path / "search.1.jsonl"
    file.rename(other)  # of another process
    bench_search.run(tmp_path, ["halving"], [2], (0, 1), True)
    again = records()
    assert sorted(r["id"] for r in again) == sorted(r["id"] for r in first)
    assert [r["rewards"] for r in sorted(again, key=lambda r: r["id"])] == [
        pytest.approx(r["rewards"]) for r in sorted(first, key=lambda r: r["id"])
    ]
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 1
    capsys.readouterr()
    bench_search.show(tmp_path, True, None)
    assert "| halving | 2 |" in capsys.readouterr().out
    monkeypatch.setitem(bench_search.STEPS_OF, "halving", 5)
    assert records() == []
