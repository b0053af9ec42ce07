"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes: evaluation and benchmark clients ask for them."""

import asyncio
from typing import Any

from fastapi import APIRouter

from loraplex.api.openai import TheService
from loraplex.api.schemas import DetokenizeRequest, TokenizeRequest
from loraplex.errors import InvalidRequest

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: TheService) -> dict[str, Any]:
    """As a request for `model` would be tokenised, the adapter's template, tokenizer and system prompt included."""
    if not body.messages and body.prompt is None:
        raise InvalidRequest("Send a prompt or messages.", param="prompt")
    async with service.text_of(body.model or service.base_name) as text:
        if body.messages:
            messages = [message.to_template() for message in body.messages]
            ids = await service.texts.encode_chat(text, messages, add_generation_prompt=body.add_generation_prompt)
        else:
            encode = text.tokenizer.encode
            ids = await asyncio.to_thread(encode, body.prompt or "", add_special_tokens=body.add_special_tokens)
    names = [text.tokenizer.token_name(token) for token in ids] if body.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": service.info.config.max_model_len,
        "tokens": ids,
        "token_strs": names,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: TheService) -> dict[str, str]:
    if any(token >= service.info.vocab_size for token in body.tokens):
        raise InvalidRequest("A token id is outside the vocabulary.", param="tokens")
    async with service.text_of(body.model or service.base_name) as text:
        return {"prompt": await asyncio.to_thread(text.tokenizer.decode, body.tokens)}


@router.get("/tokenizer_info")
def tokenizer_info(service: TheService) -> dict[str, Any]:
    tokenizer = service.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens,
        "chat_template": tokenizer.chat_template,
    }
