"""Files, tables, tokenizers and terminals as people have them: the right prompts, or a refusal."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import math
import os
import sqlite3
import subprocess
import sys
import warnings
import zipfile

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest
import torch
import tqdm
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import klrb.measure
import klrb.compare.figures
import klrb.compare.results
from klrb.cli import app
from klrb.errors import UserError
from klrb.measure import measure_kl
from klrb.compare.prompts import (
    closing_tokens,
    encode_prompts,
    prompt_notes,
    quiet_loading,
    read_prompts,
    resolve_end_tokens,
)
from klrb.compare.text import measure_text, read_documents

WORDS = ["<s>", "</s>", "<|im_end|>", "a", "b", "c", "d", "A"]
CHAT = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}b"


def build_tokenizer(first=(), last=(), eos="</s>", bos="<s>", lower=False, chat=None):
    "A word-level tokenizer that adds the given special tokens before and behind a text."
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        inner.normalizer = normalizers.Lowercase()
    if first or last:
        used = [(o, WORDS.index(o)) for o in {*first, *last}]
        inner.post_processor = processors.TemplateProcessing(
            single=" ".join([*first, "$A", *last]), special_tokens=used
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=eos,
        pad_token="</s>",
        padding_side="left",
        chat_template=chat,
    )


def build_model(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS),
            n_positions=32,
            n_embd=16,
            n_layer=1,
            n_head=2,
            initializer_range=0.6,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()


POLICY, REFERENCE = build_model(1), build_model(2)


@torch.no_grad()
def exact_kl(policy, reference, ours, theirs, steps, ends=(1,)):
    "KL of the strings of up to `steps` tokens after each side's own prompt, prefix by prefix."
    policy, reference = policy.double(), reference.double()
    total, reach = 0.0, {(): 1.0}
    for _ in range(steps):
        longer = {}
        for prefix, chance in reach.items():
            logp, logq = (
                m(torch.tensor([[*ids, *prefix]])).logits[0, -1].log_softmax(-1)
                for m, ids in ((policy, ours), (reference, theirs))
            )
            total += chance * (logp.exp() * (logp - logq)).sum().item()
            longer |= {
                (*prefix, v): chance * logp[v].exp().item()
                for v in range(len(WORDS))
                if v not in ends
            }
        reach = longer
    policy.float(), reference.float()
    return total


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zipped(text):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("prompts.txt", text)
    return made.getvalue()


def as_bytes(table, save):
    made = io.BytesIO()
    save(table, made)
    return made.getvalue()


# Files that are read

TABLE = pd.DataFrame(dict(prompt=["a", "b"], n=[1, 2]))
PARQUET = TABLE.to_parquet()
JSONL = '{"prompt": "a"}\n{"prompt": "b"}\n'
RIGHT = {
    "missing-looking cells": (
        "p.csv",
        "prompt\nNA\nNone\nnull\nnan\nN/A\nNaN\n#N/A\n-\n",
        ["NA", "None", "null", "nan", "N/A", "NaN", "#N/A", "-"],
    ),
    "numbers as written": (
        "p.csv",
        "prompt,x\n007,1\n1e5,2\n1.10,3\nTRUE,4\n2024-01-02,5\n" + "9" * 25 + ",6\n",
        ["007", "1e5", "1.10", "TRUE", "2024-01-02", "9" * 25],
    ),
    "quoted newline, comma, quote": (
        "p.csv",
        'n,prompt\r\n1,"a\r\nb"\r\n2,"a, ""b"""\r\n',
        ["a\r\nb", 'a, "b"'],
    ),
    "quoted cell before another": ("p.csv", 'prompt,label\nNA,1\n"a,\nb",3\n', ["NA", "a,\nb"]),
    "semicolons": ("p.csv", "prompt;n\na, b;1\n", ["a, b"]),
    "byte order mark": ("p.csv", b"\xef\xbb\xbfprompt,n\na,1\n", ["a"]),
    "blank lines of a CSV file": ("p.csv", "prompt\na\n\nb\n", ["a", "b"]),
    "a long cell": ("p.csv", "prompt\n" + "a" * 200_000 + "\n", ["a" * 200_000]),
    "TSV with a header": ("p.tsv", "n\tprompt\n1\ta, b\n2\t007\n", ["a, b", "007"]),
    "TSV with quotes of the text": (
        "p.tsv",
        'n\tprompt\n1\t"a" he said\n2\tb\n',
        ['"a" he said', "b"],
    ),
    "TSV that quotes": ("p.tsv", 'n\tprompt\n1\t"a\tb"\n', ["a\tb"]),
    "lines that hold separators": (
        "p.txt",
        "a\u2028b\nc\x85d\x0b\x0c\x1c\r\n\u2029e",
        ["a\u2028b", "c\x85d\x0b\x0c\x1c", "\u2029e"],
    ),
    "old line ends": ("p.txt", "a\rb\r", ["a", "b"]),
    "JSONL with separators in strings": (
        "p.jsonl",
        '{"prompt": "a\u2028b"}\r\n{"prompt": "c\x85d"}\n',
        ["a\u2028b", "c\x85d"],
    ),
    "JSONL of texts": ("p.jsonl", '"a"\n"b"\n', ["a", "b"]),
    "JSONL with a NaN elsewhere": ("p.jsonl", '{"prompt": "a", "score": NaN}\n', ["a"]),
    "JSON array of texts": ("p.json", '[\n "a",\n "b"\n]', ["a", "b"]),
    "JSON array of objects": (
        "p.json",
        '[{"prompt": "a", "n": 1}, {"prompt": "007", "n": 2}]',
        ["a", "007"],
    ),
    "JSON array of conversations": (
        "p.json",
        '[[{"role": "user", "content": "a"}]]',
        [[dict(role="user", content="a")]],
    ),
    "JSON, one conversation": (
        "p.json",
        '[{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]',
        [[dict(role="system", content="b"), dict(role="user", content="a")]],
    ),
    "JSON lines named JSON": ("p.json", JSONL, ["a", "b"]),
    "one JSON object": ("p.json", '{"prompt": "a"}', ["a"]),
    "gzip": ("p.jsonl.gz", gzip.compress(JSONL.encode()), ["a", "b"]),
    "gzip under another name": ("p.jsonl", gzip.compress(JSONL.encode()), ["a", "b"]),
    "packed twice": ("p.jsonl", bz2.compress(gzip.compress(JSONL.encode())), ["a", "b"]),
    "bz2": ("p.csv.bz2", bz2.compress(b"prompt\nNA\n"), ["NA"]),
    "xz": ("p.txt.xz", lzma.compress(b"a\nb\n"), ["a", "b"]),
    "zstd": ("p.txt.zst", pa.compress(b"a\nb\n", "zstd", asbytes=True), ["a", "b"]),
    "named packed and is not": ("p.csv.gz", "prompt\nNA\n", ["NA"]),
    "Parquet": ("p.parquet", PARQUET, ["a", "b"]),
    "Parquet named CSV": ("p.csv", PARQUET, ["a", "b"]),
    "Parquet, packed, no suffix": ("p", gzip.compress(PARQUET), ["a", "b"]),
    "Feather": ("p.feather", as_bytes(TABLE, pa.feather.write_feather), ["a", "b"]),
    "UTF-16": ("p.txt", "a\né\n".encode("utf-16"), ["a", "é"]),
    "UTF-16 CSV of a spreadsheet": ("p.csv", "prompt\tn\r\nNA\t1\r\n".encode("utf-16"), ["NA"]),
}


@pytest.mark.parametrize("case", RIGHT)
def test_files_are_read_as_they_are(case, tmp_path):
    name, content, expected = RIGHT[case]
    assert read_prompts(write(tmp_path / name, content)) == expected


# Files and lists that are refused


def wrong_files():
    database = sqlite3.connect(":memory:")
    database.execute("create table prompts (prompt)")
    database.commit()
    rows = dict(role="user", content="a")
    return {
        "ZIP named text": ("p.txt", zipped("a"), "a ZIP archive"),
        "workbook": ("p.xlsx", zipped("a"), "an Excel workbook"),
        "database": (
            "p.csv",
            database.serialize() if hasattr(database, "serialize") else b"SQLite format 3\0",
            "SQLite",
        ),
        "damaged gzip": ("p.txt.gz", gzip.compress(b"a\n" * 1000)[:-20], "damaged"),
        "damaged xz": ("p.txt.xz", lzma.compress(b"a\n" * 1000)[:-20], "damaged"),
        "damaged bz2": ("p.txt", bz2.compress(b"a\n" * 1000)[:-20], "damaged"),
        "damaged zstd": (
            "p.txt",
            pa.compress(os.urandom(3000), "zstd", asbytes=True)[:-20],
            "damaged",
        ),
        "PDF": ("p.txt", b"%PDF-1.7 a", "a PDF"),
        "Git LFS pointer": (
            "p.jsonl",
            "version https://git-lfs.github.com/spec/v1\n",
            "git lfs pull",
        ),
        "UTF-16 without a mark": ("p.txt", "a\nb".encode("utf-16-le"), "NUL"),
        "Latin-1 CSV": ("p.csv", "prompt\ndéjà\n".encode("latin-1"), "not UTF-8: byte 8"),
        "text named Parquet": ("p.parquet", "prompt\na\n", "cannot be read"),
        "empty CSV cell": ("p.csv", "prompt,n\na,1\n,2\n", "prompt 2 is blank"),
        "empty quoted cell": ("p.csv", 'prompt\na\n""\nb\n', "prompt 2 is blank"),
        "unquoted comma": ("p.csv", "prompt\na, b\n", "row 1 has 2 cells"),
        "too few cells": ("p.csv", "n,prompt\n1,a\n2\n", "row 2 has 1 cells"),
        "quote that never ends": ("p.csv", 'prompt\n"a\nb\n', "cannot be read"),
        "two columns of one name": ("p.csv", "prompt,prompt\na,b\n", "2 columns 'prompt'"),
        "no header": ("p.csv", "a\nb\n", "it has a"),
        "empty CSV": ("p.csv", "", "empty"),
        "header only": ("p.csv", "prompt\n", "empty"),
        "key twice": ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', "occurs twice"),
        "row without the column": (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "b"}\n',
            "row 2 has no column 'prompt'",
        ),
        "null in JSONL": ("p.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "prompt 2 is missing"),
        "NaN in JSONL": ("p.jsonl", '{"prompt": NaN}\n', "prompt 1 is missing"),
        "nested column": (
            "p.jsonl",
            '{"prompt": {"a": "b"}}\n',
            "prompt 1 is \"{'a': 'b'}\", a dict",
        ),
        "half a surrogate pair": (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "\\ud800"}\n',
            "prompt 2 holds half",
        ),
        "deeply nested": ("p.json", "[" * 100_000, "not JSON"),
        "JSON number": ("p.json", "3", "no JSON array"),
        "columns in JSON": ("p.json", '{"prompt": {"0": "a"}}', "a dict"),
        "messages of one role": ("p.json", json.dumps([rows, rows]), "list of lists"),
        "blank array entry": ("p.json", '["a", " "]', "prompt 2 is blank"),
        "missing Parquet cell": (
            "p.parquet",
            pd.DataFrame(dict(prompt=["a", None])).to_parquet(),
            "prompt 2 is missing",
        ),
        "Parquet of numbers": (
            "p.parquet",
            pd.DataFrame(dict(prompt=[1])).to_parquet(),
            "must be a text",
        ),
    }


WRONG_FILES = wrong_files()


def refusal(call, *arguments, **settings):
    with pytest.raises(UserError) as caught:
        call(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize("case", WRONG_FILES)
def test_files_are_refused_by_what_they_are(case, tmp_path):
    name, content, expected = WRONG_FILES[case]
    assert expected in refusal(read_prompts, write(tmp_path / name, content))


def user(content, **rest):
    return [dict(role="user", content=content, **rest)]


WRONG = {
    "blank entry": (["a", "", "b"], "prompt 2 is blank"),
    "None": (["a", None], "prompt 2 is missing"),
    "NaN": (["a", math.nan], "prompt 2 is missing"),
    "pd.NA": (pd.Series(["a", pd.NA], dtype="string"), "prompt 2 is missing"),
    "number": (["a", 7], "must be a text"),
    "token ids": ([[1, 2]], "message 1 is a int"),
    "texts in a list": ([["a", "b"]], "message 1 is a str"),
    "bytes": (b"a", "is a bytes"),
    "bytes in a list": ([b"a"], "must be a text"),
    "set": ({"a", "b"}, "is a set"),
    "an open file": (io.StringIO("a"), "name of a file"),
    "number alone": (3, "is a int"),
    "array of no dimension": (np.array("a"), "is a"),
    "tensor": (torch.tensor([1]), "must be a text"),
    "splits": (
        datasets.DatasetDict(train=datasets.Dataset.from_dict(dict(prompt=["a"]))),
        "the splits train",
    ),
    "a column that is a text": (dict(prompt="a"), "a list is wanted"),
    "no such column": (datasets.Dataset.from_dict(dict(question=["a"])), "it has question"),
    "empty table": (pd.DataFrame(dict(prompt=[])), "is empty"),
    "a text instead of a list": ("The film was", "[text]"),
    "a very long text": ("a b" * 5000, "cannot be read"),
    "text with NUL": ("a\0b", "`prompts` is"),
    "lone surrogate": (["a", "b \udcff"], "prompt 2 holds half of a surrogate pair, U+DCFF"),
    "surrogate in a message": ([user("\ud800")], "prompt 1, message 1 holds half"),
    "no messages": ([[]], "prompt 1 is an empty list"),
    "content None": ([user("a"), user(None)], "prompt 2, message 1 has no content"),
    "tool calls without content": (
        [[*user("a"), dict(role="assistant", tool_calls=[])]],
        "message 2 has no content",
    ),
    "unknown role": ([[dict(role="usr", content="a")]], "the role 'usr'"),
    "no role": ([[{"from": "human", "value": "a"}]], "it has from, value"),
    "picture": ([user([dict(type="image", url="a.png")])], "type 'image'"),
    "picture beside text": (
        [user([dict(type="text", text="a"), dict(type="image_url", image_url="b")])],
        "type 'image_url'",
    ),
    "part without its text": ([user([dict(type="text", text=None)])], "no text"),
    "content a number": ([user(3)], "a int as its content"),
}


@pytest.mark.parametrize("case", WRONG)
def test_lists_and_tables_are_refused_with_the_number_of_the_prompt(case):
    given, expected = WRONG[case]
    assert expected in refusal(read_prompts, given)


FRAME = pd.DataFrame(dict(n=[1, 2, 3], prompt=["NA", "b", "c"]), index=[5, 6, 7])
GIVEN = {
    "DataFrame": FRAME,
    "filtered DataFrame": FRAME[FRAME.n > 0],
    "Series": FRAME.prompt,
    "array": FRAME.prompt.to_numpy(),
    "array of str": np.array(["NA", "b", "c"]),
    "Dataset": datasets.Dataset.from_pandas(FRAME),
    "IterableDataset": datasets.Dataset.from_pandas(FRAME).to_iterable_dataset(),
    "generated IterableDataset": datasets.IterableDataset.from_generator(
        lambda: iter(FRAME.to_dict("records"))
    ),
    "column of a Dataset": datasets.Dataset.from_pandas(FRAME)["prompt"],
    "arrow table": pa.Table.from_pandas(FRAME),
    "arrow array": pa.array(["NA", "b", "c"]),
    "dict": dict(prompt=["NA", "b", "c"]),
    "dict of a Series": dict(prompt=FRAME.prompt),
    "list of dicts": FRAME.to_dict("records"),
    "tuple": ("NA", "b", "c"),
    "generator": None,
    "categories": FRAME.assign(prompt=FRAME.prompt.astype("category")),
    "keys": dict.fromkeys(["NA", "b", "c"]).keys(),
}


@pytest.mark.parametrize("case", GIVEN)
def test_a_table_gives_its_rows(case):
    given = (o for o in ["NA", "b", "c"]) if case == "generator" else GIVEN[case]
    found = read_prompts(given)
    assert found == ["NA", "b", "c"] and {type(o) for o in found} == {str}


def test_a_data_set_of_the_hub_gives_its_column_quietly(monkeypatch, capsys):
    def load(name, split):
        assert (name, split) == ("some/data", "train")
        list(tqdm.tqdm(range(3)))
        return datasets.Dataset.from_pandas(FRAME)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_prompts("some/data") == ["NA", "b", "c"] and capsys.readouterr().err == ""
    assert "it has n, prompt" in refusal(read_prompts, "some/data", "question")


def test_standard_input_is_read_by_the_same_rules(monkeypatch):
    for given in ("a\u2028b\nc\n".encode(), gzip.compress("a\u2028b\nc\n".encode())):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert read_prompts("-") == ["a\u2028b", "c"]


def test_columns_and_parts():
    assert read_prompts(FRAME.rename(columns=dict(prompt="question")), "question") == [
        "NA",
        "b",
        "c",
    ]
    assert "leave it out" in refusal(read_prompts, ["a"], "prompt")
    parts = [dict(type="text", text="a "), dict(type="text", text="b")]
    assert read_prompts([user(parts), user("a", name=None)]) == [user("a b"), user("a")]
    table = pa.Table.from_pylist(
        [
            dict(prompt=user(parts)),
            dict(prompt=[dict(role="user", content=[dict(type="text", text="c")])]),
        ]
    )
    assert read_prompts(table) == [user("a b"), user("c")]
    assert read_prompts(None) == [None]


# Documents


def test_documents_are_read_by_the_same_rules(tmp_path):
    text = "a\u2028b\r\nc\r\n\r\nd\r\n \r\n\r\ne\r\n"
    assert read_documents(write(tmp_path / "t.md", text)) == ["a\u2028b\nc", "d", "e\n"]
    assert read_documents(write(tmp_path / "t.txt.gz", gzip.compress(text.encode()))) == [
        "a\u2028b\nc",
        "d",
        "e\n",
    ]
    assert read_documents(write(tmp_path / "t.txt", text.encode("utf-16"))) == [
        "a\u2028b\nc",
        "d",
        "e\n",
    ]
    assert read_documents(write(tmp_path / "t.csv", "text\nNA\n")) == ["NA"]
    assert read_documents([np.array([3, 4]), torch.tensor([5]), (1, 2), "a"]) == [
        [3, 4],
        [5],
        [1, 2],
        "a",
    ]
    for given, message in (
        (["a", ""], "document 2 is blank"),
        ([[3, -1]], "no token id"),
        ([[0.5]], "no token id"),
        ([[True]], "no token id"),
        (["a", []], "document 2 is an empty list"),
        (None, "`text` is None"),
        ([user("a")], "no token id"),
        ([1, 2], "a int"),
    ):
        assert message in refusal(read_documents, given)
    assert "document 2 holds the token id 8" in refusal(
        measure_text, POLICY, REFERENCE, [[3], [8, 3]], tokenizer=build_tokenizer()
    )


# Tokenizers that close every text


@pytest.mark.parametrize(
    "first, last",
    [(["<s>"], ["</s>"]), ([], ["</s>"]), (["<s>"], ["<|im_end|>", "</s>"]), (["</s>"], ["</s>"])],
)
def test_a_completion_goes_on_from_the_prompt(first, last):
    "Against enumeration after what the tokenizer puts before the text, and the text."
    tokenizer = build_tokenizer(first, last)
    ids = [WORDS.index(o) for o in [*first, "a", "c"]]
    assert tokenizer("a c").input_ids == ids + [WORDS.index(o) for o in last]
    assert encode_prompts(["a c"], tokenizer) == [ids]
    exact = exact_kl(POLICY, REFERENCE, ids, ids, 2)
    found = measure_kl(
        POLICY, REFERENCE, ["a c"], tokenizer=tokenizer, samples=1500, max_new_tokens=2
    )
    assert abs(found.kl.mean - exact) < 4 * found.kl.stderr
    wrong = exact_kl(POLICY, REFERENCE, tokenizer("a c").input_ids, tokenizer("a c").input_ids, 2)
    assert abs(found.kl.mean - wrong) > 4 * found.kl.stderr  # the test can tell
    assert "ends every prompt with" in repr(found) and found.to_json()["notes"]


def test_what_the_user_wrote_stays():
    tokenizer = build_tokenizer(["<s>"], ["</s>"])
    assert encode_prompts(["a </s>", "</s> </s>", "<s>"], tokenizer) == [
        [0, 3, 1],
        [0, 1, 1],
        [0, 0],
    ]
    assert encode_prompts(["a </s>"], build_tokenizer()) == [[3, 1]]
    assert closing_tokens(build_tokenizer(["<s>"], []), ["a"]) == []
    text = measure_text(POLICY, REFERENCE, ["a c"], tokenizer=tokenizer)
    assert text.tokens.token_id.tolist() == [3, 5]
    assert encode_prompts(["a"], build_tokenizer(["<s>"], ["</s>"], chat=CHAT), chat=True) == [
        [3, 3, 4]
    ]  # "u a b"
    empty = build_tokenizer(["<s>"], [])
    empty.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    assert "prompt 2 ('x') has no tokens" in refusal(encode_prompts, ["a", "x"], empty)


def test_llama_tokenizers_that_are_told_to_add_the_end(tmp_path):
    from transformers import LlamaTokenizerFast

    plain = build_tokenizer()
    plain.save_pretrained(tmp_path)
    for bos in (True, False):
        told = LlamaTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), add_bos_token=bos, add_eos_token=True
        )
        if told("a").input_ids[-1] != told.eos_token_id:
            pytest.skip("this version ignores add_eos_token")
        assert encode_prompts(["a c"], told)[0][-1] != told.eos_token_id


# Two tokenizers


def saved(folder, name, model, tokenizer, **generation):
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def test_bos_on_one_side_is_said_and_measured(tmp_path):
    ours = saved(tmp_path, "ours", build_model(1), build_tokenizer(["<s>"]))
    theirs = saved(tmp_path, "theirs", build_model(1), build_tokenizer())
    exact = exact_kl(build_model(1), build_model(1), [0, 3, 5], [3, 5], 2)
    for policy, reference, sign in ((ours, theirs, "policy"), (theirs, ours, "reference")):
        found = measure_kl(policy, reference, ["a c", "a c"], samples=600, max_new_tokens=2)
        assert (
            f"the {sign}'s prompts begin with '<s>'" in repr(found)
            and "2 of 2 prompts" in found.to_json()["notes"][0]
        )
        if sign == "policy":
            assert abs(found.kl.mean - exact) < 4 * found.kl.stderr
    answer = CliRunner().invoke(
        app,
        [
            "measure",
            ours,
            theirs,
            "--prompts",
            str(write(tmp_path / "p.txt", "a c\n")),
            "--samples",
            "5",
            "--max-new-tokens",
            "2",
        ],
    )
    assert answer.exit_code == 0 and "NOTE: the policy's prompts begin with '<s>'" in answer.stdout
    same = measure_kl(ours, ours, ["a c"], samples=5, max_new_tokens=2)
    assert not same.to_json()["notes"] and "NOTE" not in repr(same) and same.kl.mean == 0
    text = measure_text(ours, theirs, ["a c d"])
    assert (
        text.statistics.value[0] == 0 and not text.to_json()["notes"]
    )  # both read the policy's tokens


@pytest.mark.parametrize(
    "ours, theirs, chat, expected",
    [
        (dict(chat=CHAT), dict(chat=CHAT + " c"), True, "two chat templates differ: 1 of 1"),
        (dict(), dict(lower=True), False, "two tokenizers differ: 1 of 1"),
        (dict(first=["<s>"]), dict(first=["</s>"]), False, "two tokenizers differ"),
        (
            dict(chat=CHAT + " </s>"),
            dict(chat=CHAT + " </s>"),
            True,
            "chat template ends prompts with '</s>'",
        ),
    ],
)
def test_other_differences_are_said(ours, theirs, chat, expected):
    pair = tuple(build_tokenizer(**o) for o in (ours, theirs))
    assert any(expected in o for o in prompt_notes(["A c"], pair, chat=chat))
    assert not prompt_notes(["A c"], (build_tokenizer(), build_tokenizer()))


def test_another_beginning_of_text_is_said_in_text_mode(tmp_path):
    ours = saved(tmp_path, "ours", build_model(1), build_tokenizer())
    theirs = saved(tmp_path, "theirs", build_model(2), build_tokenizer(bos="</s>", lower=True))
    found = measure_text(ours, theirs, ["A c"])
    assert (
        "windows begin with the policy's '<s>'" in repr(found)
        and "1 of 1 documents" in found.to_json()["notes"][0]
    )


def test_end_tokens_are_named(tmp_path):
    "Base and chat version: one vocabulary, two ends."
    ours = saved(
        tmp_path, "ours", build_model(1), build_tokenizer(eos="<|im_end|>"), eos_token_id=2
    )
    theirs = saved(tmp_path, "theirs", build_model(2), build_tokenizer(), eos_token_id=1)
    prompts = write(tmp_path / "p.txt", "a c\n")
    assert "`end_tokens`" in refusal(measure_kl, ours, theirs, prompts)
    for given, ends in (
        (["<|im_end|>"], (2,)),
        (["</s>", "<|im_end|>"], (1, 2)),
        (1, (1,)),
        ("d", (6,)),
    ):
        found = measure_kl(ours, theirs, prompts, end_tokens=given, samples=1000, max_new_tokens=3)
        exact = exact_kl(build_model(1), build_model(2), [3, 5], [3, 5], 3, ends)
        assert abs(found.kl.mean - exact) < 4 * found.kl.stderr
    options = ["--prompts", str(prompts), "--samples", "5", "--max-new-tokens", "3", "--json"]
    answer = CliRunner().invoke(
        app, ["measure", ours, theirs, *options, "--end-token", "<|im_end|>", "--end-token", "</s>"]
    )
    assert json.loads(answer.stdout)["settings"]["end_tokens"] == ["<|im_end|>", "</s>"]
    for bad in ([], ["a b"], ["no such"], [99], [True], [None], [""]):
        assert "`end_tokens`" in refusal(
            resolve_end_tokens, bad, (build_tokenizer(), build_tokenizer())
        )
    assert (
        measure_text(ours, theirs, ["a c"]).statistics.value[0] > 0
    )  # ends mean nothing on given text


def test_ends_of_the_generation_settings_that_differ_are_said(tmp_path):
    ours = saved(tmp_path, "ours", build_model(1), build_tokenizer(), eos_token_id=[1, 2])
    theirs = saved(tmp_path, "theirs", build_model(2), build_tokenizer(), eos_token_id=1)
    found = measure_kl(ours, theirs, ["a c"], samples=1000, max_new_tokens=3)
    assert "the policy ends with '</s>' '<|im_end|>', the reference with '</s>'" in repr(found)
    assert (
        abs(found.kl.mean - exact_kl(build_model(1), build_model(2), [3, 5], [3, 5], 3, (1, 2)))
        < 4 * found.kl.stderr
    )


# Chat


def test_parts_are_measured_and_shown(tmp_path):
    tokenizer = build_tokenizer(chat=CHAT)
    parts = [user([dict(type="text", text="a c")])]
    found = measure_kl(
        POLICY,
        REFERENCE,
        parts,
        tokenizer=tokenizer,
        chat=True,
        samples=5,
        max_new_tokens=2,
        save=tmp_path / "out",
    )
    again = measure_kl(
        POLICY, REFERENCE, ["a c"], tokenizer=tokenizer, chat=True, samples=5, max_new_tokens=2
    )
    assert (
        found.kl == again.kl
        and found.largest[0]["prompt"] == "a c"
        and "a c" in found._repr_html_()
    )


@pytest.mark.parametrize(
    "given, settings, expected",
    [
        ([user("a")], dict(), "set `chat`"),
        (
            [[dict(role="system", content="a"), *user("b")]],
            dict(chat=True, policy_prefix="c"),
            "has a system message",
        ),
        ([[dict(role="user", content="zzz")]], dict(chat=True), "leaves out the user's message"),
        ([user("b")], dict(chat=True), "failed on prompt 1"),
    ],
)
def test_what_a_template_would_lose_is_refused(given, settings, expected):
    "Templates drop what they do not know, and raise what they like."
    template = (
        "{% for m in messages if m.content != 'zzz' %}"
        "{% if m.content == 'b' and loop.length == 1 %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    assert expected in refusal(
        measure_kl, POLICY, REFERENCE, given, tokenizer=build_tokenizer(chat=template), **settings
    )


def test_refused_before_a_model_is_loaded(monkeypatch, tmp_path):
    def load(*args):
        raise AssertionError("loaded")

    monkeypatch.setattr(klrb.measure, "load_pair", load)
    for given, settings in (
        (["\ud800"], {}),
        (["a"], dict(policy_prefix="\ud800")),
        ([user(None)], dict(chat=True)),
        ([user("a")], {}),
        (["a", ""], {}),
    ):
        refusal(measure_kl, "no/where", "no/where", given, **settings)


# The result is not lost


def small(**settings):
    return measure_kl(
        POLICY,
        REFERENCE,
        ["a c", "d"],
        tokenizer=build_tokenizer(),
        **dict(samples=5, max_new_tokens=2) | settings,
    )


@pytest.mark.parametrize(
    "broken", ["plot_positions", "plot_convergence", "save_figure", "_write_heatmap"]
)
def test_a_figure_that_fails_takes_nothing_with_it(broken, monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("no font")

    home = klrb.compare.results if broken == "_write_heatmap" else klrb.compare.figures
    monkeypatch.setattr(home, broken, fail)
    with pytest.warns(UserWarning, match="no font"):
        found = small(save=tmp_path / "out")
    read = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert (
        read["status"] == "complete"
        and read["results"]["reverse"]["estimates"][0]["mean"] == found.kl.mean
    )
    assert (
        len(pd.read_parquet(tmp_path / "out" / "rollouts.parquet")) == 10
        and (tmp_path / "out" / "reverse-prompts.csv").is_file()
    )
    assert (tmp_path / "out" / "heatmap.html").is_file() == (
        broken != "_write_heatmap"
    )  # the others are drawn


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("mode", ["sampled", "text"])
def test_a_full_disk_or_ctrl_c_at_the_end_leaves_the_result(mode, error, monkeypatch, tmp_path):
    def fail(*args, **settings):
        raise error

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.warns(UserWarning, match="the result is returned"):
        if mode == "text":
            assert (
                len(
                    measure_text(
                        POLICY,
                        REFERENCE,
                        ["a c d"],
                        tokenizer=build_tokenizer(),
                        save=tmp_path / "out",
                    ).tokens
                )
                == 3
            )
        else:
            assert small(save=tmp_path / "out").kl.mean > 0


def test_displays_take_any_text():
    odd = "[bold]\x1b[31m\x07<b>&\ud800\u202e:smile:\n"
    shown = klrb.compare.results.heatmap_text(odd, [odd], [0.5]).plain
    assert "\x1b" not in shown and "\\x1b" in shown and "[bold]" in shown and "\ud800" not in shown
    page = klrb.compare.results.heatmap_html(odd, [odd], [0.5])
    page.encode()
    assert "<b>&" not in page and "\x1b" not in page
    found = small()
    found.about["notes"] = ["<script>"]
    assert "<script>" not in found._repr_html_() and "NOTE: <script>" in repr(found)


def test_a_terminal_without_the_characters(tmp_path):
    "In a process of its own: the encoding of standard output is set before Python starts."
    for name in ("ours", "theirs"):
        saved(tmp_path, name, build_model(1), build_tokenizer())
    write(tmp_path / "p.jsonl", '{"prompt": "a \u00e9 \u2603"}\n')
    options = [
        "--prompts",
        "p.jsonl",
        "--policy-prefix",
        "b ",
        "--samples",
        "4",
        "--max-new-tokens",
        "2",
    ]
    command = [sys.executable, "-m", "klrb.cli", "measure", "ours", "theirs", *options]
    environment = os.environ | dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "RB" in done.stdout and "\\u2603" in done.stdout


def test_json_is_ascii(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, "ours", build_model(1), build_tokenizer())
    prompts = write(tmp_path / "p.txt", "a\n")
    options = [
        "--prompts",
        str(prompts),
        "--policy-prefix",
        "\u2603 ",
        "--samples",
        "2",
        "--max-new-tokens",
        "2",
        "--json",
    ]
    answer = CliRunner().invoke(app, ["measure", "ours", "ours", *options])
    assert (
        answer.stdout.isascii()
        and json.loads(answer.stdout)["settings"]["policy_prefix"] == "\u2603 "
    )


# Quiet, and the user's models as they were


@pytest.mark.parametrize("function, given", [(measure_kl, ["a c"]), (measure_text, ["a c d"])])
def test_loading_draws_no_bars_and_leaves_the_setting(function, given, tmp_path, capsys):
    import transformers.utils.logging as logging

    ours = saved(tmp_path, "ours", build_model(1), build_tokenizer())
    before, made = logging.is_progress_bar_enabled(), tqdm.tqdm.__init__
    logging.enable_progress_bar()
    try:
        capsys.readouterr()
        function(
            ours, ours, given, **dict(samples=2, max_new_tokens=2) if function is measure_kl else {}
        )
        assert capsys.readouterr().err == ""
        assert logging.is_progress_bar_enabled() and tqdm.tqdm.__init__ is made
        with contextlib.suppress(ValueError), quiet_loading():
            raise ValueError
        assert tqdm.tqdm.__init__ is made
    finally:
        if not before:
            logging.disable_progress_bar()


@pytest.mark.parametrize("ending", ["right", "error", "interrupt"])
@pytest.mark.parametrize("function", [measure_kl, measure_text])
def test_models_are_given_back_as_they_were(function, ending, monkeypatch):
    policy, reference, tokenizer = build_model(1).train(), build_model(2), build_tokenizer()
    policy.transformer.h[0].attn.eval()  # frozen parts of a model in training
    policy.transformer.wte.weight.requires_grad_(False)
    tokenizer.padding_side = "right"
    generation, modes = policy.generation_config, [m.training for m in policy.modules()]
    seen = []

    def watched(*args, **kwargs):
        seen.append(any(m.training for m in policy.modules()))
        if ending != "right":
            raise dict(error=RuntimeError, interrupt=KeyboardInterrupt)[ending]
        return inner(*args, **kwargs)

    module, name = (
        ("klrb.compare.rollouts", "_one_batch")
        if function is measure_kl
        else ("klrb.compare.text", "score_completions")
    )
    inner = getattr(sys.modules[module], name)
    monkeypatch.setattr(f"{module}.{name}", watched)
    with contextlib.suppress(RuntimeError, KeyboardInterrupt):
        function(
            policy,
            reference,
            ["a c"],
            tokenizer=tokenizer,
            **dict(samples=2, max_new_tokens=2) if function is measure_kl else {},
        )
    assert seen and not any(seen)
    assert [m.training for m in policy.modules()] == modes and not any(
        m.training for m in reference.modules()
    )
    assert policy.generation_config is generation and tokenizer.padding_side == "right"
    assert [p.requires_grad for p in policy.parameters()].count(False) == 1


def test_adapters_are_given_back_as_they_were():
    config = LoraConfig(
        r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = get_peft_model(build_model(1), config, adapter_name="x")
        policy.add_adapter("y", config)
        policy.set_adapter("y")
    policy.train()
    needs = {name: p.requires_grad for name, p in policy.named_parameters()}
    measure_kl(
        policy,
        policy.get_base_model(),
        ["a"],
        tokenizer=build_tokenizer(),
        samples=2,
        max_new_tokens=2,
    )
    assert (
        policy.active_adapter == "y"
        and policy.training
        and all(m.training for m in policy.modules())
    )
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == needs


# Arguments


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature="hot"),
        dict(temperature=True),
        dict(temperature=math.nan),
        dict(reference_temperature=[1]),
        dict(alpha="x"),
        dict(alpha=None),
        dict(alpha=math.inf),
        dict(direction=["reverse"]),
        dict(divergence=None),
        dict(chat="yes"),
        dict(chat=1),
        dict(policy_prefix=None),
        dict(reference_prefix=b"a"),
        dict(column=3),
        dict(trust_remote_code="no"),
        dict(save=3),
        dict(progress="on"),
        dict(tokenizer="gpt2"),
        dict(end_tokens=2.5),
        dict(end_tokens=[]),
        dict(samples=2.0),
        dict(samples=True),
        dict(max_new_tokens="3"),
        dict(max_new_tokens=None),
        dict(seed=1.5),
        dict(seed=None),
        dict(batch_tokens=None),
        dict(max_samples=None),
        dict(tolerance=[1], samples=None),
        dict(dtype="int8"),
        dict(dtype=None),
        dict(device="abacus"),
    ],
)
def test_bad_arguments_are_one_line_with_their_name(settings):
    name = next(iter(settings))
    given = dict(tokenizer=build_tokenizer(), samples=5) | settings
    assert f"`{name}" in refusal(measure_kl, POLICY, REFERENCE, ["a c"], **given)


@pytest.mark.parametrize(
    "settings",
    [
        dict(window="5"),
        dict(window=None),
        dict(direction=3),
        dict(divergence=["kl"]),
        dict(alpha=math.nan),
        dict(seed=-1),
        dict(batch_tokens=0),
        dict(column=["a"]),
        dict(save=[1]),
        dict(progress=2),
        dict(tokenizer=3),
        dict(trust_remote_code=None),
    ],
)
def test_bad_arguments_of_text_mode(settings):
    name = next(iter(settings))
    assert f"`{name}" in refusal(
        measure_text, POLICY, REFERENCE, ["a c"], **dict(tokenizer=build_tokenizer()) | settings
    )


def test_a_tokenizer_that_would_be_ignored_is_refused(tmp_path):
    ours = saved(tmp_path, "ours", build_model(1), build_tokenizer())
    other = build_tokenizer(["<s>"])
    for function in (measure_kl, measure_text):
        assert "by name" in refusal(function, ours, ours, ["a c"], tokenizer=other)
    assert (
        measure_kl(
            ours, ours, ["a c"], tokenizer=build_tokenizer(), samples=2, max_new_tokens=2
        ).kl.mean
        == 0
    )
