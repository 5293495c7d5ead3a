"""Write text with the weights that OpenAI published: GPT-2's files in this stage's own model and tokenizer.

    uv run stages run 06 demos/open_gpt2.py openai-community/gpt2 "The meaning of life is"
    uv run stages run 06 demos/open_gpt2.py my/folder "ROMEO:" --temperature 0.8 --top-k 40 --seed 3

The model is a folder with the four FILES, or the name of one on the Hugging Face hub, which is downloaded once (548 MB
for the smallest, 124,439,808 parameters). Nothing in the files is run, and nothing is passed over: a tensor, a token or
a setting that changes the numbers and that this stage does not have is an error.

Our model is GPT-2's. The files differ in three ways, and each is a trap:

1. query, key and value are one matrix, "c_attn", three times as wide;
2. layers are "Conv1D", with weights stored [in, out]; nn.Linear keeps them [out, in];
3. tokens are bytes, written in the files as printable characters: a space is spelled "Ġ".
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from model import GPT, ModelConfig
from sample import SampleConfig, generate
from tokenizer import END, BPETokenizer

FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt")

SIZES = {  # our name: the name in config.json
    "vocab_size": "vocab_size", "block_size": "n_positions", "n_embd": "n_embd", "n_head": "n_head",
    "n_layer": "n_layer",
}
FIXED = {  # what our model does; the first value is what a config that says nothing means
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of GELU with tanh
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def find_files(model: str) -> dict[str, Path]:
    """The four FILES of a folder or of a model on the hub. Raises BadInput when they cannot be had."""
    # `stages run` changes to the stage's folder and says where the path was typed.
    folder = Path(os.environ.get("STAGES_FROM", "."), model)
    if not folder.is_dir():
        return download(model)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise BadInput(f"{folder} has no {', '.join(missing)}: a folder with GPT-2 holds {', '.join(FILES)}")
    return {name: folder / name for name in FILES}


def download(model: str) -> dict[str, Path]:
    """The four FILES from the hub, or from its cache on this machine. Raises BadInput."""
    import huggingface_hub as hub  # only where there is no folder

    def fetch(**how):
        return {name: Path(hub.hf_hub_download(model, name, **how)) for name in FILES}

    try:
        try:
            return fetch(local_files_only=True)  # here since an earlier download
        except hub.errors.LocalEntryNotFoundError:
            # Asked once. Without a network `hf_hub_download` would ask six times, and tell of each.
            hub.get_hf_file_metadata(hub.hf_hub_url(model, FILES[0]))
            return fetch()
    except Exception as error:  # of the hub's client, of its HTTP library: they have no common type
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise BadInput(
            f"{model!r} is no folder, and the hub does not give it ({reason}): check the name and the network, "
            f"or name a folder with {', '.join(FILES)}"
        ) from None


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises BadInput when there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise BadInput(f"{path} is damaged ({error}): fetch it again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} is damaged (no object, but a {type(found).__name__}): fetch it again")
    return found


def read_config(path: Path) -> ModelConfig:
    """The shape in a config.json. Raises BadInput for a model that computes something else than ours.

    The config's dropout is left out: it is for training, and this model writes.
    """
    about = read_json(path)
    for name, allowed in FIXED.items():
        if about.get(name, allowed[0]) not in allowed:
            raise BadInput(f"{path}: {name} is {about[name]!r}, but GPT-2's is {allowed[0]!r}: this is another model")
    for name in SIZES.values():
        if not isinstance(about.get(name), int):
            raise BadInput(f"{path}: {name} is {about.get(name)!r} and should be a whole number: this is no GPT-2")
    if about.get("n_inner") not in (None, 4 * about["n_embd"]):
        raise BadInput(f"{path}: n_inner is {about['n_inner']}, but GPT-2's feed-forward is 4 x n_embd wide")
    return ModelConfig(**{ours: about[theirs] for ours, theirs in SIZES.items()})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name. Raises BadInput when it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged ({error}): fetch it again") from None


def convert(theirs: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """GPT-2's tensors as the state of our `GPT(config)`. Raises BadInput for a name or shape that does not belong.

    Both of GPT-2's traps are silent where matrices are square: they fit the wrong way round, and the text is nonsense.
    """
    left = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}  # some files have the prefix
    V, T, C = config.vocab_size, config.block_size, config.n_embd

    def take(name: str, *shape: int) -> torch.Tensor:
        if name not in left:
            raise BadInput(f"the weights have no {name}: this is no GPT-2 of {config.n_layer} layers")
        if left[name].shape != shape:
            raise BadInput(f"the weights' {name} is {list(left[name].shape)}, the config says {list(shape)}")
        return left.pop(name).float()

    def norm(name: str, new: str) -> dict:
        return {f"{new}.weight": take(f"{name}.weight", C), f"{new}.bias": take(f"{name}.bias", C)}

    def linear(name: str, new: str, n_in: int, n_out: int) -> dict:
        # Conv1D stores [in, out], nn.Linear [out, in].
        return {f"{new}.weight": take(f"{name}.weight", n_in, n_out).T, f"{new}.bias": take(f"{name}.bias", n_out)}

    ours = {"tok_emb.weight": take("wte.weight", V, C), "pos_emb": take("wpe.weight", T, C)}
    for i in range(config.n_layer):
        old, new = f"h.{i}", f"blocks.{i}"
        ours |= norm(f"{old}.ln_1", f"{new}.norm1")
        # One layer [C -> 3C] makes query, key and value: its outputs are three stretches of C, in this order.
        fused = linear(f"{old}.attn.c_attn", "fused", C, 3 * C)
        for key, tensor in fused.items():
            for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                ours[key.replace("fused", f"{new}.attn.{name}")] = part
        ours |= linear(f"{old}.attn.c_proj", f"{new}.attn.proj", C, C)
        ours |= norm(f"{old}.ln_2", f"{new}.norm2")
        ours |= linear(f"{old}.mlp.c_fc", f"{new}.ffn.fc", C, 4 * C)
        ours |= linear(f"{old}.mlp.c_proj", f"{new}.ffn.proj", 4 * C, C)
        # The published files keep the causal mask, and what stood for minus infinity, beside the weights.
        mask = left.pop(f"{old}.attn.bias", None)
        left.pop(f"{old}.attn.masked_bias", None)
        if mask is not None and not torch.equal(mask.float(), torch.ones(1, 1, T, T).tril()):
            raise BadInput(f"the weights' {old}.attn.bias is not the causal mask of {T} positions")
    ours |= norm("ln_f", "norm")
    ours["head.weight"] = ours["tok_emb.weight"]
    head = left.pop("lm_head.weight", None)  # most files leave it out
    if head is not None and not torch.equal(head.float(), ours["head.weight"]):
        raise BadInput("the weights' lm_head.weight is not wte.weight, but GPT-2's head is the token embedding")
    if left:
        raise BadInput(f"the weights have {', '.join(sorted(left))}, which GPT-2 of {config.n_layer} layers has not")
    return ours


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's files -> the byte: {"!": 33, ..., "Ā": 0, ..., "Ġ": 32, ...}.

    Printable characters of Latin-1 stand for themselves. For the other 68, in order, come those from U+0100 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(other)}


def read_tokenizer(vocab: Path, merges: Path) -> BPETokenizer:
    """The tokenizer in a vocab.json {token: id} and a merges.txt, a pair of tokens on each line, first merges first.

    Raises BadInput for a vocabulary that is not what the merges make of the 256 bytes, in their order, and END.
    """
    ids = read_json(vocab)
    alphabet = byte_alphabet()
    try:
        first, *lines = merges.read_text("utf-8").splitlines()
        if not first.startswith("#version"):
            lines.insert(0, first)
        made = [a + b for a, b in (line.split(" ") for line in lines)]
        # Our tokenizer merges what ranks lowest, so a token's id must say when it was learned.
        if sorted(made, key=ids.__getitem__) != made:
            raise ValueError("the merges are in another order than the ids")
        special = {END: ids[END]}
        ranks = {bytes(alphabet[char] for char in token): ids[token] for token in [*alphabet, *made]}
    except (ValueError, KeyError, TypeError) as error:
        what = f"no token {error}" if isinstance(error, KeyError) else error
        raise BadInput(f"{vocab} and {merges.name} are no tokenizer of GPT-2 ({what})") from None
    if sorted([*ranks.values(), *special.values()]) != list(range(len(ids))):
        raise BadInput(f"{vocab} has tokens that no merge makes, or two with the same id: it is no tokenizer of GPT-2")
    return BPETokenizer(ranks, special)


def open_gpt2(model: str):
    """A folder or a name on the hub -> (our GPT with its weights, our BPETokenizer). Raises BadInput."""
    files = find_files(model)
    config = read_config(files["config.json"])
    tokenizer = read_tokenizer(files["vocab.json"], files["merges.txt"])
    if len(tokenizer) != config.vocab_size:
        raise BadInput(f"{model}: a tokenizer of {len(tokenizer)}, a model of {config.vocab_size} tokens")
    state = convert(read_tensors(files["model.safetensors"]), config)
    gpt = GPT(config)
    gpt.load_state_dict(state)
    return gpt, tokenizer


def write(model, tokenizer, prompt: str, length: int, config: SampleConfig):
    """Yield up to `length` token ids that follow `prompt`; END, where the model says that the text is over, ends them.

    GPT-2 has seen END before every text: it stands for a prompt without a token.
    """
    end = tokenizer.special[END]
    ids = torch.tensor([tokenizer.encode(prompt) or [end]], device=next(model.parameters()).device)
    for token in itertools.islice(generate(model, ids, config), length):
        if token.item() == end:
            return
        yield token.item()


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with GPT-2's files, or its name on the hub, openai-community/gpt2")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--length", type=int, default=100, help="most tokens to write (default: 100)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, SampleConfig)
    args = parser.parse_args(argv)
    if args.length < 1:
        raise BadInput(f"--length {args.length}: write at least 1 token")
    config = options.build(SampleConfig, args)
    device = setup(args.device, args.seed)

    model, tokenizer = open_gpt2(args.model)
    say(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens\n")
    say(args.prompt, end="")
    part = []  # tokens that do not make whole characters yet: one of several bytes may be cut between two tokens
    for token in write(model.to(device), tokenizer, args.prompt, args.length, config):
        part.append(token)
        if not (text := tokenizer.decode(part)).endswith("\ufffd"):
            say(text, end="")
            part.clear()
    say(tokenizer.decode(part))


if __name__ == "__main__":
    run_program(main)
