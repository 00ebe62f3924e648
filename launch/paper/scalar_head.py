"""python launch/paper/scalar_head.py CLASSIFIER OUT: a two-label classifier as a reward model.

reward = logit(label 1) - logit(label 0), the paper's reward of the film reviews, is linear in the last hidden state:
its head is the difference of the classifier's two rows.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def convert(classifier: str, out: str) -> None:
    """Write OUT, a model with one label and the classifier's tokenizer. Exits with one line on anything else."""
    if Path(out).exists():
        sys.exit(f"error: {out} exists; nothing was overwritten")
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    head = getattr(model, "score", None)
    if head is None or head.weight.shape[0] != 2 or head.bias is not None:
        sys.exit(f"error: {classifier} has no linear head `score` of two labels without bias, as GPT-2 and Llama have")
    negative, positive = head.weight.detach()
    model.score = torch.nn.Linear(head.in_features, 1, bias=False, dtype=head.weight.dtype)
    model.score.weight.data[0] = positive - negative
    model.config.num_labels = model.num_labels = 1
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(out)
    print(f"reward model: {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.splitlines()[0])
    convert(*sys.argv[1:])
