"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes: evaluation and benchmark clients ask for them."""

from typing import Any

from fastapi import APIRouter

from loraplex.api.openai import TheService
from loraplex.api.schemas import DetokenizeRequest, TokenizeRequest
from loraplex.errors import InvalidRequest

router = APIRouter()


@router.post("/tokenize")
def tokenize(body: TokenizeRequest, service: TheService) -> dict[str, Any]:
    if body.model is not None:
        service.resolve(body.model)
    if body.messages:
        messages = [message.to_template() for message in body.messages]
        ids = service.tokenizer.encode_chat(messages, add_generation_prompt=body.add_generation_prompt)
    elif body.prompt is not None:
        ids = service.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    else:
        raise InvalidRequest("Send a prompt or messages.", param="prompt")
    names = [service.tokenizer.token_name(token) for token in ids] if body.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": service.info.config.max_model_len,
        "tokens": ids,
        "token_strs": names,
    }


@router.post("/detokenize")
def detokenize(body: DetokenizeRequest, service: TheService) -> dict[str, str]:
    if body.model is not None:
        service.resolve(body.model)
    if any(token >= service.info.vocab_size for token in body.tokens):
        raise InvalidRequest("A token id is outside the vocabulary.", param="tokens")
    return {"prompt": service.tokenizer.decode(body.tokens)}


@router.get("/tokenizer_info")
def tokenizer_info(service: TheService) -> dict[str, Any]:
    tokenizer = service.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens,
        "chat_template": tokenizer.chat_template,
    }
