"""Uses `chat serve` through OpenAI's own client; the address is the argument."""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key=sys.argv[2], max_retries=0)
hi = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]

assert [model.id for model in client.models.list()] == ["lm"]
assert client.models.retrieve("lm").id == "lm"

whole = client.chat.completions.create(model="lm", messages=hi, seed=3, max_tokens=12, n=2, temperature=0.9, top_p=0.9)
assert len(whole.choices) == 2 and whole.usage.completion_tokens == 24, whole
assert {choice.finish_reason for choice in whole.choices} == {"length"}, whole

stream = client.chat.completions.create(
    model="lm", messages=hi, seed=3, max_tokens=12, n=2, temperature=0.9, top_p=0.9, stream=True,
    stream_options={"include_usage": True},
)
texts, usage = ["", ""], None
for chunk in stream:
    usage = chunk.usage or usage
    for choice in chunk.choices:
        texts[choice.index] += choice.delta.content or ""
assert texts == [choice.message.content for choice in whole.choices], texts
assert usage == whole.usage, usage

told = client.chat.completions.create(
    model="lm", messages=hi, max_completion_tokens=5, logprobs=True, top_logprobs=3, frequency_penalty=0.5,
    presence_penalty=-0.5, stop=["\n"],
)
content = told.choices[0].logprobs.content
assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content), content

text = client.completions.create(model="lm", prompt="Once", max_tokens=5, logprobs=2, seed=1)
assert len(text.choices[0].logprobs.tokens) == 5, text
pieces = client.completions.create(model="lm", prompt="Once", max_tokens=5, seed=1, stream=True)
assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text

for error, call in [
    (openai.NotFoundError, lambda: client.chat.completions.create(model="gpt-4", messages=hi)),
    (openai.BadRequestError, lambda: client.chat.completions.create(model="lm", messages=hi, logit_bias={"5": 1})),
    (openai.UnprocessableEntityError, lambda: client.chat.completions.create(model="lm", messages=hi, temperature=3)),
    (openai.AuthenticationError, lambda: client.with_options(api_key="wrong").models.list()),
]:
    try:
        call()
    except error as caught:
        assert caught.body["message"], caught
    else:
        raise AssertionError(error)
