"""Stream a chat through the `openai` client (pip install openai).

usage: chat.py [PROMPT]
"""

import sys

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
prompt = sys.argv[1] if len(sys.argv) > 1 else "And it came to pass"
for chunk in client.chat.completions.create(
    model="demo", messages=[{"role": "user", "content": prompt}], stream=True, max_tokens=80
):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
