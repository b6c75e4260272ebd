"""A packed base is an ordinary transformers model: Auto classes load it, PEFT adapts it, a plain loop trains it.

    python examples/transformers_peft.py BASE OUT

BASE is a directory made by `bitloft quantize`.
"""

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitloft


def main(base: str, out: str) -> None:
    bitloft.register()  # from here on transformers and PEFT know packed weights
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    batch = AutoTokenizer.from_pretrained(base)("a base is frozen and packed", return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(out)

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    with torch.no_grad():
        same = torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
    print(f"reloaded adapter gives the same logits: {same}")


if __name__ == "__main__":
    main(*sys.argv[1:])
