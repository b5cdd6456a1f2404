"""Rewards by a reward model, as in iLR-DPO: a Llama whose head has one output (transformers'
LlamaForSequenceClassification). model.find_reward_model reads and checks one."""
import math

import torch
from torch.nn.utils.rnn import pad_sequence

from data.processes import batches

@torch.no_grad()
def score(model, samples, tokens, tokenizer):
    """For run.map: yields (index, reward), in passes of at most `tokens` padded tokens. A conversation is in
    the reward model's own chat format. NaN where it is longer than the reward model's context."""
    texts, short = [], []
    for i, x in enumerate(samples):
        texts.append(tokenizer.prompt(x.prompt.content, (x.prompt.steps or "") + x.text))
        if len(texts[i]) <= model.config.context:
            short.append(i)
        else:
            yield i, math.nan
    for group in batches(short, tokens, size=lambda i: len(texts[i])):
        rows, last = [], []
        for i in group:
            rows.append(torch.tensor(texts[i], device=model.device))
            # As in transformers, the head reads the last token that is not the padding. Where the end token
            # is also the padding, this is the token before it.
            last.append(max((t for t, id in enumerate(texts[i]) if id != model.config.pad), default=0))
        hidden = model(pad_sequence(rows, batch_first=True))[torch.arange(len(rows)), last]  # (B, C)
        yield from zip(group, model.logits(hidden)[:, 0].tolist())
