"""Once around: quantize a model, train an adapter, pack it, measure it, answer with and without it in one batch.

    python examples/quickstart.py MODEL ROWS.jsonl OUT [BITS]

MODEL is a folder, GGUF file or hub name; ROWS.jsonl holds rows such as {"messages": [...]} or {"text": "..."}.
"""

import sys
from pathlib import Path

import bitloft
from bitloft.integrations.record import load_tokenizer


def main(model: str, rows: str, out: str, bits: str = "0.8") -> None:
    folder = Path(out)
    base = bitloft.quantize(model, folder / "base", format="lm4:64", rank=16)
    print(f"base: {base.stored_bytes:,} bytes, {base.true_bits_with_start:.2f} true bits per packed weight")

    trained = bitloft.train(folder / "base", rows, folder / "adapter", epochs=1.0, length=128)
    print(f"adapter: {trained.parameters:,} values, loss {trained.first_loss:.2f} -> {trained.last_loss:.2f}")

    packed = bitloft.compress(folder / "adapter", folder / "packed", bits=float(bits))
    print(f"packed: {packed.bytes:,} bytes, {packed.true_bits:.2f} true bits per value")

    before = bitloft.evaluate(folder / "base", rows, length=128)
    after = bitloft.evaluate(folder / "base", rows, adapter=folder / "packed", length=128)
    print(f"perplexity on these rows: {before.perplexity:.2f} without, {after.perplexity:.2f} with it")

    loaded = bitloft.load(folder / "base", adapters={"mine": folder / "packed"})
    tokenizer = load_tokenizer(folder / "base")
    batch = tokenizer(["the quick brown fox", "the quick brown fox"], return_tensors="pt")
    tokens = loaded.generate(**batch, adapter_names=["mine", "__base__"], max_new_tokens=8, do_sample=False)
    for name, row in zip(["mine", "base"], tokens, strict=True):
        print(f"{name}: {tokenizer.decode(row)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
