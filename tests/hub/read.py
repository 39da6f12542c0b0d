"""Prints, as JSON, what each of the `config.data` fields given as JSON leads to.

    python -m tests.hub.read '[{"path": "owner/name"}, {"tokenizer": "owner/name"}]'

Documents as [id, text], a tokenizer as its file, a refusal as its line. The Hub's clients look up its address when they
are imported, so that each address needs a process of its own.
"""

import json
import sys

from configs import base
from research.config import ConfigError
from research.data.corpora import documents
from research.data.tokenizer import load_tokenizer


def read(fields: dict) -> list | str:
    config = base.get_config("cpu")
    config.data.update(source="hf", **fields)
    try:
        if "path" in fields:
            return [[document.id, document.text] for document in documents(config.data)]
        return load_tokenizer(config, []).to_str()
    except ConfigError as error:
        return str(error)


if __name__ == "__main__":
    print(json.dumps([read(fields) for fields in json.loads(sys.argv[1])]))
    # Its threads would abort this process, now and then, if they were still reading.
    assert "pyarrow" not in sys.modules, "Arrow belongs in a process of its own"
