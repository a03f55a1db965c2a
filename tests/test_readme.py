"""What the README and the pages beside it show works as it stands."""
from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from conftest import make_tiny, policy_of

from evaluation.sweep.settings import load_sweep, variants_of
from utils.config import REPOSITORY, load_config
from wan.kv_cache import policy
from wan.kv_cache.policy import policy_fields

PAGE = "docs/architecture.md"  # of the policy


def block(page: str, language: str, containing: str) -> str:
    """The one block of the page that holds these words."""
    whole = (REPOSITORY / page).read_text(encoding="utf-8")
    [found] = [text for text in re.findall(rf"```{language}\n(.*?)```", whole, re.DOTALL) if containing in text]
    return found


def test_the_policy_that_is_shown_is_deep_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file and its YAML, as they are printed, make the video that policy sink makes."""
    monkeypatch.setattr(policy, "_REGISTRY", dict(policy._policies()))
    (tmp_path / "mine.py").write_text(block(PAGE, "python", '@register("mine")'))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("mine")
    (tmp_path / "mine.yaml").write_text(
        block(PAGE, "yaml", "policy: mine").replace("base.yaml", str(REPOSITORY / "configs/base.yaml")),
    )
    config = load_config(tmp_path / "mine.yaml", policy_fields=policy_fields(), build_policy=policy.build_policy)
    assert dict(config.kv_cache) == {"policy": "mine", "window_frames": 21, "sink_frames": 6}
    tiny, sizes = make_tiny(), {"window_frames": 12, "sink_frames": 4}
    made = [tiny.run(policy_of({"policy": name, **sizes}), 30) for name in ("mine", "sink")]
    assert torch.equal(*made)
    assert [policy_of({"policy": name, **sizes}).tail_frames(9, True, 3) for name in ("mine", "sink")] == [5, 5]


def test_the_sweep_of_the_readme_is_one(tmp_path: Path) -> None:
    """It loads, and its three methods are variants."""
    (tmp_path / "first.yaml").write_text(block("README.md", "yaml", "sink_8:"))
    assert [one.name for one in variants_of(load_sweep(tmp_path / "first.yaml", []))] == [
        "rolling", "deep_forcing", "sink_8",
    ]


def test_links_lead_somewhere() -> None:
    """Every relative link of the README and of the pages beside it, with its heading where it names one."""
    def anchors(path: Path) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}

    pages, seen = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")], 0
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            path, _, heading = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), (page, target)
            assert not heading or heading in anchors(file), (page, target)
            seen += 1
    assert seen > 20
