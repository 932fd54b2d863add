#!/usr/bin/env bash
# Copies small parts of the fixtures into fuzz/corpus, where cargo fuzz starts from.
set -euo pipefail
cd "$(dirname "$0")"
fixtures=../tests/fixtures
mkdir -p corpus/{safetensors_header,gguf_header,config,tokenizer_json,chat_template}
find "$fixtures" -name 'config.json' | while read -r f; do cp "$f" "corpus/config/$(basename "$(dirname "$f")").json"; done
find "$fixtures" -name 'tokenizer.json' | while read -r f; do cp "$f" "corpus/tokenizer_json/$(basename "$(dirname "$f")").json"; done
find "$fixtures" -name '*.safetensors' -size -600k | while read -r f; do
  head -c 20000 "$f" > "corpus/safetensors_header/$(basename "$(dirname "$f")")-$(basename "$f")"
done
find "$fixtures" -name '*.gguf' | while read -r f; do cp "$f" "corpus/gguf_header/$(basename "$f")"; done
python3 - "$fixtures/chat_templates.json" <<'PY' || echo "no python3: no seeds of chat templates"
import json, sys
for i, (name, text) in enumerate(json.load(open(sys.argv[1]))["templates"].items()):
    open(f"corpus/chat_template/{i}.jinja", "w").write(text)
PY
