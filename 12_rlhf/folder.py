"""A folder with an open model, as Hugging Face's libraries write it: weights, settings and tokenizer.

Each is read as data. A file that names others may only name those beside it, and a pickle is never opened.
"""

import re
from pathlib import Path

from shared.errors import BadInput

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from config_json import only, read_json
from tokenizer_json import read_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The files with a folder's weights, and which tensors each should hold if an index says so. Raises BadInput."""
    files = {WEIGHTS: None}
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise BadInput(f"{folder / INDEX} is damaged (no weight_map): fetch it again")
        files = {file: {name for name in places if places[name] == file} for file in sorted(set(places.values()))}
    for file in files:
        # A path that a stranger wrote may lead anywhere: a plain name stays in the folder.
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise BadInput(f"{folder / INDEX} names {file!r}, which is no file beside it: fetch it again")
        if not (folder / file).is_file():
            pickles = sorted(found.name for found in folder.glob("*.bin"))
            reason = f", and {pickles[0]}, a pickle, is not opened: that can run code" if pickles else ""
            raise BadInput(f"{folder} has no {file}{reason}")
    return files


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name. Raises BadInput when a file is damaged or holds others than the index says."""
    found = {}
    for file, names in weight_files(folder).items():
        try:
            part = load_file(folder / file)
        except SafetensorError as error:
            raise BadInput(f"{folder / file} is damaged ({error}): fetch it again") from None
        if names is not None and (wrong := sorted(names ^ part.keys())):
            raise BadInput(f"{folder / file} and {INDEX} disagree about {wrong[0]}: fetch both again")
        found |= part
    return found


def read_folder(folder: Path):
    """A folder -> (its config, its tensors, its tokenizer and what belongs to that). Raises BadInput."""
    about, (tokenizer, start) = read_json(folder / "config.json"), read_tokenizer(folder / "tokenizer.json")
    path = folder / "tokenizer_config.json"
    extra = read_json(path) if path.is_file() else {}
    fixed = {"add_prefix_space": (None, False), "add_eos_token": (None, False)}
    only({name: value for name, value in extra.items() if name in fixed}, fixed, path)
    names = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = extra.get(name)
        names[name] = token.get("content") if isinstance(token, dict) else token
    names = {name: token for name, token in names.items() if token is not None}
    template = extra.get("chat_template")
    if isinstance(template, list):  # several, of which one is for conversations
        template = {str(each.get("name")): each.get("template") for each in template if isinstance(each, dict)}
        template = template.get("default")
    if (folder / "chat_template.jinja").is_file():  # newer folders keep it by itself
        template = (folder / "chat_template.jinja").read_text("utf-8", errors="replace")
    if not all(isinstance(text, str) for text in [*names.values(), template or ""]):
        raise BadInput(f"{path}: special tokens and the chat template should be texts")
    ids = {name: tokenizer.special[token] for name, token in names.items() if token in tokenizer.special}
    if extra.get("add_bos_token") and not start:
        start = [ids[name] for name in ("bos_token",) if name in ids]
    ends = {ids[name] for name in ("eos_token",) if name in ids}
    words = {"tokenizer": tokenizer, "template": template, "names": names, "start": start, "ends": ends}
    return about, read_tensors(folder), words
