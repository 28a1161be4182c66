"""The code in docs/store.md runs as it stands."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "store.md"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files to the collector
def test_every_block_of_python_on_the_page_runs(sample, tmp_path, monkeypatch):
    sample.write(tmp_path / "latents", "safetensors")
    sample.write(tmp_path / "latents-tar", "webdataset")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 7
    names = {}
    for block in blocks:
        exec(
            compile(block, str(PAGE), "exec"),
            names,
        )
    assert names["manifest"].samples == 100
