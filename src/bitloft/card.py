"""The model card that travels with a packed base."""

from typing import Any

from bitloft import __version__
from bitloft.options import QuantizeOptions
from bitloft.rules import plan_of


def of_base(report: Any, options: QuantizeOptions) -> str:
    """README.md of a base directory; ``report`` is a QuantizeReport."""
    rank = plan_of(options).start_rank
    start = f"rank {rank}, {options.start_format}" if rank else "none"
    return f"""---
library_name: transformers
tags: [bitloft, {options.format}, {options.solver}]
base_model: {report.source}
---

# {report.source}, packed by bitloft {__version__}

| | |
|---|---|
| format | {report.formats}, solver `{options.solver}` |
| start (LoRA repair inside the base) | {start} |
| true bits per packed weight | {report.true_bits:.3f} ({report.true_bits_with_start:.3f} with the start) |
| payload bits per packed weight | {report.payload_bits:.3f} (codes alone) |
| packed weights | {report.weights:,} in {len(report.matrices)} matrices |
| kept in 16 or 32 bit | embeddings {report.embedding_bytes:,} bytes, other {report.other_bytes:,} bytes |
| fingerprint | `{report.fingerprint}` |

Reading it needs the package `bitloft`; without it transformers refuses the packed weights with a size mismatch.

```python
import bitloft
from transformers import AutoModelForCausalLM

bitloft.register()
model = AutoModelForCausalLM.from_pretrained("{report.out}")
```
"""


def of_merged(report: Any) -> str:
    """README.md of a base that an adapter was merged into; ``report`` is a MergeReport."""
    largest = max((m.change for m in report.matrices), default=0.0)
    losses = "not measured"
    if report.loss_after is not None:
        losses = f"{report.loss_before:.4f} with the adapter beside the base, {report.loss_after:.4f} merged"
    return f"""---
library_name: transformers
tags: [bitloft]
---

# {report.base} with {report.adapter} merged in, by bitloft {__version__}

| | |
|---|---|
| merged matrices | {len(report.matrices)}; {report.untouched} packed ones are as they were |
| largest change of a matrix by quantizing it again | {largest:.4f} (relative Frobenius norm) |
| loss per token | {losses} |
| fingerprint | `{report.fingerprint}` |

Reading it needs the package `bitloft`: `import bitloft; model = bitloft.load(DIRECTORY)`.
"""
