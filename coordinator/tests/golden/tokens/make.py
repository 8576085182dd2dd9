"""Writes tiny tokenizers, documents in every kind of file, and the ids that transformers gives for them.

Needs tokenizers, transformers, numpy; and pyarrow for documents.parquet. Run in this folder: `python make.py`.
"""

import json

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

DOCUMENTS = [
    "The ship turned north before the storm. Nobody on deck had seen such a sky: green, then black.",
    "",
    "Grüße aus Köln – 12345 Kölsch, bitte!   Three  spaces, a tab\tand a new\n\nparagraph.\n",
    "日本語のテキスト 🚢🚢",
    "A document <|end|> with a special token inside it, and <|begin|> another one.",
    " leading space, 'quoted', we'll see; it's I'd'VE 1000000 x=y+z;\r\nwindows line\r\n",
    "the the the the " * 60,
]
LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train(pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    return tokenizer


def main():
    plain = train(pre_tokenizers.ByteLevel(add_prefix_space=False))
    # What the file asks for here is not obeyed by `tokenizer(text)` of transformers.
    plain.enable_truncation(4)
    plain.enable_padding(length=200)
    plain.save("tokenizer.json")
    split = pre_tokenizers.Split(Regex(LLAMA), behavior="isolated")
    begin = train(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )
    begin.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", 1)]
    )
    begin.save("tokenizer_begin.json")

    ids = {}
    for name in ["tokenizer", "tokenizer_begin"]:
        fast = PreTrainedTokenizerFast(tokenizer_file=f"{name}.json")
        ids[name] = [fast(text).input_ids for text in DOCUMENTS]
    with open("ids.json", "w") as out:
        json.dump(ids, out)
    with open("documents.jsonl", "w", encoding="utf-8", newline="") as out:
        for index, text in enumerate(DOCUMENTS):
            out.write(json.dumps({"id": index, "text": text}, ensure_ascii=index % 2 == 0) + "\n")
            out.write("\n" if index == 2 else "")
    np.savez("ids.npz", two=np.array([[5, 6, 7], [8, 9, -1]], np.int32), one=np.arange(10, dtype=np.uint16))
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        print("no pyarrow: documents.parquet is left as it is")
        return
    texts = pyarrow.table({"id": list(range(len(DOCUMENTS) + 1)), "text": [None, *DOCUMENTS]})
    pyarrow.parquet.write_table(texts, "documents.parquet", row_group_size=3, compression="zstd")


main()
