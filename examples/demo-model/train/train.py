"""Train the demo model: a 5.5 M parameter Llama on public-domain English. A few minutes on one GPU.

usage: train.py CORPUS OUT_DIR [STEPS]     (CORPUS comes from prepare_text.py; needs torch, transformers, tokenizers)

Half of the training text is the books as they are, half is dialogues cut out of them: the user gives the beginning of
a passage or a name that occurs in it, the assistant answers with the passage. So a chat with the model is a
continuation in the manner of its books, which is all that a model of this size can do.
"""

import json
import random
import re
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, USER, ASSISTANT, SYSTEM = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL = [BOS, EOS, USER, ASSISTANT, SYSTEM]
VOCAB, CONTEXT, BATCH = 4096, 2048, 32
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ASKS = ["Tell me about {}.", "What do you know of {}?", "Write about {}.", "Who is {}?", "{}"]
OPENINGS = ["{}", "{}", "Continue: {}", "How does this go on? {}"]
# Lines of the books; the golden test uses the one whose greedy continuation leaves the least to rounding.
LINES = [
    "In the beginning God created", "The LORD is my shepherd;", "It is a truth universally acknowledged,",
    "Emma Woodhouse, handsome, clever, and rich,", "And the angel of the LORD said unto", "The family of Dashwood had",
    "For God so loved the world,", "And it came to pass in those days,", "Now the sons of Reuben",
]


def make_tokenizer(documents, out):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT, additional_special_tokens=[USER, ASSISTANT, SYSTEM],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # training adds its own specials
    return tokenizer


def sentences(document):
    return [s.strip() for s in re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)\s+|(?<=[.!?]['\"])\s+|\n", document) if s.strip()]


def dialogue(document_sentences, encode, rng):
    """One to three turns cut out of one place of a book."""
    ids = [0]
    at = rng.randrange(max(1, len(document_sentences) - 8))
    for _ in range(rng.choice([1, 1, 2, 3])):
        asked, answered = rng.choice([1, 1, 2]), rng.randint(1, 5)
        passage = document_sentences[at : at + asked + answered]
        if len(passage) < 2:
            break
        question, answer = " ".join(passage[:asked]), " ".join(passage[asked:])
        names = [w for w in re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b", answer) if w not in ("And", "The", "Lord")]
        if names and rng.random() < 0.35:
            ask, answer = rng.choice(ASKS).format(rng.choice(names)), " ".join(passage)
        else:
            if rng.random() < 0.3:  # cut the question short, the answer completes it
                words = question.split()
                cut = rng.randint(max(1, len(words) // 3), len(words))
                question, answer = " ".join(words[:cut]), " ".join(words[cut:] + [answer])
            ask = rng.choice(OPENINGS).format(question)
        ids += [2, *encode(ask), 1, 3, *encode(answer), 1]
        at += asked + answered
    return ids


def batches(documents, encode, rng, device):
    encoded = [[0, *encode(d), 1] for d in documents]
    split = [sentences(d) for d in documents]
    weights = [len(s) for s in split]

    def row():
        ids = []
        chat = rng.random() < 0.5
        while len(ids) <= CONTEXT:
            if chat:
                ids += dialogue(rng.choices(split, weights)[0], encode, rng)
            else:
                document = rng.choices(encoded, weights)[0]
                start = 0 if rng.random() < 0.3 else rng.randrange(len(document))
                ids += document[start : start + CONTEXT]
        return ids[: CONTEXT + 1]

    while True:
        yield torch.tensor([row() for _ in range(BATCH)], device=device)


def memoised(tokenizer):
    cache = {}

    def encode(text):
        if text not in cache:
            if len(cache) > 400_000:
                cache.clear()
            cache[text] = tokenizer.encode(text).ids
        return cache[text]

    return encode


def main(corpus, out, steps=2900):
    began = time.time()
    rng = random.Random(7)
    torch.manual_seed(7)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = Path(corpus).read_text(encoding="utf-8").split("\n\f\n")
    tokenizer = make_tokenizer(documents, out)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, attention_dropout=0.1, rope_theta=10000.0,
    )
    model = LlamaForCausalLM(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(documents)} documents, tokenizer after {time.time() - began:.0f} s", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    stream = batches(documents, memoised(tokenizer), rng, device)
    for step in range(steps):
        rows = next(stream)
        with torch.autocast(device, torch.bfloat16):
            logits = model(rows[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.time() - began:.0f} s", flush=True)
    model = model.to(torch.bfloat16).eval()
    model.config.attention_dropout = 0.0
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)  # what the server uses when a request says nothing
    model.save_pretrained(out)
    show(model, tokenizer, out, device)


@torch.no_grad()
def continuation(model, tokenizer, line, device):
    """Greedy continuation in f32 and the smallest gap between the best and the second logit on the way."""
    ids = [0, *tokenizer.encode(line).ids]
    done = model.generate(torch.tensor([ids], device=device), max_new_tokens=48, do_sample=False)[0].tolist()
    top = model(torch.tensor([done], device=device)).logits[0, len(ids) - 1 : -1].float().topk(2).values
    margin = float((top[:, 0] - top[:, 1]).min())
    return {"prompt": line, "token_ids": done, "text": tokenizer.decode(done[len(ids) :]), "smallest_margin": margin}


def show(model, tokenizer, out, device):
    """Write the golden continuation, print some answers to read."""
    model = model.float()
    goldens = [continuation(model, tokenizer, line, device) for line in LINES]
    for golden in goldens:
        print(json.dumps(golden))
    best = max(goldens, key=lambda golden: golden["smallest_margin"])
    Path(out, "golden.json").write_text(json.dumps(best) + "\n")
    for ask in ("Tell me about Elizabeth.", "And it came to pass", "Who is Moses?", "Hello, how are you?"):
        chat = [0, 2, *tokenizer.encode(ask).ids, 1, 3]
        done = model.generate(torch.tensor([chat], device=device), max_new_tokens=80, do_sample=True, temperature=0.7)
        print(ask, "->", tokenizer.decode(done[0].tolist()[len(chat) :]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
