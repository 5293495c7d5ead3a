"""What the demos of small models share: models of a few letters, demonstrations, and answers with a hand in them.

A question is a text such as "2+3?", and an answer one that ends in ".". There are no tags, and a letter is a token.
"""

from collections.abc import Callable

from shared.console import progress

import torch

from cache import Cache
from hf import Opened
from model import GPT, ModelConfig
from rollout import Rollout, log_probs, masked_mean
from sample import SampleConfig, draw, evaluation, pad_left, prefill
from tokenizer import CharTokenizer
from train import TrainConfig, make_optimizer, schedule

END = "."
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # a question, and then its answer


def small(letters: str, scale, seed: int, device, block_size: int = 64) -> Opened:
    """A new model that knows these letters, of `scale.n_layer` layers with `scale.n_embd` channels."""
    torch.manual_seed(seed)
    tokenizer = CharTokenizer(letters)
    config = ModelConfig(len(tokenizer), block_size, scale.n_embd, n_head=4, n_kv_head=4, n_layer=scale.n_layer)
    return Opened(GPT(config).to(device), tokenizer, PLAIN, ends={tokenizer.index[END]})


def record(question: str, gold: str, **more) -> dict:
    """A question and its right answer, as the functions of rollout.py and grpo.py want them."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": gold}], **more}


def rolled(opened: Opened, records: list[dict], answers: list[str], marks: list[list[bool]]) -> Rollout:
    """Written answers as a Rollout, as many to each question; `marks` tell which of their letters are to be learned.

    An answer without the "." has no end. Nothing is drawn: these may be demonstrations.
    """
    n, index, device = len(answers) // len(records), opened.tokenizer.index, opened.model.tok_emb.weight.device
    which = [i for i in range(len(records)) for _ in range(n)]
    asked = [opened.tokenizer.encode(records[i]["messages"][0]["content"]) for i in which]
    context, pad = pad_left(asked, device)  # [B, P], [B]
    A = max(map(len, answers))
    ids = [[index[letter] for letter in text] + [0] * (A - len(text)) for text in answers]
    mask = torch.tensor([row + [False] * (A - len(row)) for row in marks], device=device)
    return Rollout(torch.cat([context, torch.tensor(ids, device=device)], 1), pad, mask,
                   [text.removesuffix(END) for text in answers], [text.endswith(END) for text in answers], which)


def fit(model, steps: int, loss_of: Callable, title: str, after: Callable = lambda step: None, lr: float = 1.0):
    """Minimise `loss_of(step)` with the recipe of train.py, at a share `lr` of its rates; `after(step)` may look on."""
    config = TrainConfig(steps, lr=1e-2 * lr, muon_lr=0.02 * lr, warmup=20, weight_decay=0.0)
    optimizer = make_optimizer(model, config)
    highest = [group["lr"] for group in optimizer.param_groups]
    with progress(steps, title) as bar:
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * schedule(step, config)
            loss = loss_of(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            after(step + 1)
            bar.update(step + 1, loss=loss.detach())


def imitation(opened: Opened, drawn: Rollout):
    """The loss of supervised tuning: nats per marked letter."""
    return -masked_mean(log_probs(opened.model, drawn)[0], drawn.mask)


@torch.no_grad()
def write(opened: Opened, records: list[dict], length: int, temperature: float = 1.0, seed: int = 0, n: int = 1,
          meddle: Callable[[str, str], str | None] | None = None) -> Rollout:
    """`n` answers of at most `length` letters to each question, as `rollout.rollout`, but with a hand in them.

    `meddle(text, letter)` is asked about each letter that the policy has drawn behind `text`. What it returns is
    written in the letter's place; None leaves the letter. The mask has what the policy drew itself: in "[2+3=5]", of
    which a program wrote "5]" behind the drawn "=", it has "[2+3=".
    """
    asked = [r["messages"][0]["content"] for r in records for _ in range(n)]
    tokenizer, generator = opened.tokenizer, torch.Generator().manual_seed(seed % 2**63)
    texts, marks = [""] * len(asked), [[] for _ in asked]
    queues = [""] * len(asked)  # what a program has still to write, before the policy goes on
    context, pad = pad_left([tokenizer.encode(question) for question in asked], opened.model.tok_emb.weight.device)
    cache = Cache(opened.model, len(asked), context.shape[1])
    with evaluation(opened.model):
        logits = prefill(opened.model, context, cache, pad)  # [B, V]
        for t in range(length):
            last = [END] * len(asked)  # what each text is read with next; of one that is over, nobody reads on
            for b, token in enumerate(draw(logits.cpu(), SampleConfig(temperature), generator).tolist()):
                if texts[b].endswith(END):
                    continue
                letter, own = tokenizer.texts[token], False
                if not queues[b]:
                    queues[b] = (meddle and meddle(texts[b], letter)) or letter
                    own = queues[b][0] == letter
                last[b], queues[b] = queues[b][0], queues[b][1:]
                texts[b] += last[b]
                marks[b].append(own)
            if t + 1 == length or all(text.endswith(END) for text in texts):
                break
            logits = opened.model(torch.tensor([tokenizer.encode(x) for x in last]).to(context.device), cache)[:, -1]
    return rolled(opened, records, texts, marks)
