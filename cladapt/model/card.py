"""The README.md of a saved adapter, in the place of PEFT's template: what it is, where its scores are, how to load it.

It names no folder but those beside it. An export writes a longer one; see `cladapt.export.card`.
"""

from collections.abc import Mapping
from typing import Any

CARD = "README.md"
WITH_CLADAPT = """Its base is no model of transformers. In this folder, with the base that has the fingerprint above and
the stream:

    cladapt recommend HISTORIES --adapter . --base BASE --data STREAM
"""


def short_card(record: Mapping[str, Any], auto_class: str) -> str:
    """The card of an adapter with this `cladapt.json`.

    `auto_class`: the class of transformers that loads its base; empty where none does.
    """
    block = record.get("block", "?")
    known = {
        "base": f"fingerprint {record['base']}",
        "method": record.get("method"),
        "seed": record.get("seed"),
        "stream": record.get("stream") and f"fingerprint {record['stream']}, up to block {block}",
        "mean validation log-likelihood": record.get("valid_log_likelihood"),
        "cladapt": record.get("cladapt"),
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in known.items() if value is not None)
    return f"""---
library_name: peft
tags: [lora, peft, continual-learning, cladapt]
---

# LoRA adapter of block {block}

{lines}

`cladapt.json` says more of what it was made from, `adapter_config.json` of its shape. Its scores are in `metrics.json`
of its run, two folders up, once `cladapt eval` has measured it; `cladapt export` writes a card that has them.

## Load

{_with_transformers(auto_class) if auto_class else WITH_CLADAPT}"""


def _with_transformers(auto_class: str) -> str:
    return f"""In this folder, with the base that has the fingerprint above:

```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, ".").eval()
```
"""
