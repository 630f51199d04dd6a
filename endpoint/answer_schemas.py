"""JSON Schemas of what the server answers, by the names under which /openapi.json lists them.

Members marked optional appear only when they were asked for or are known.
"""

from __future__ import annotations

from endpoint.declarations import Json

STRING: Json = {"type": "string"}
INTEGER: Json = {"type": "integer"}
NUMBER: Json = {"type": "number"}
BOOLEAN: Json = {"type": "boolean"}
COUNT: Json = {"type": "integer", "minimum": 0}
NULL: Json = {"type": "null"}
TEXT_OR_NULL: Json = {"type": ["string", "null"]}
NUMBER_OR_NULL: Json = {"type": ["number", "null"]}


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(optional: Json | None = None, /, **members: Json) -> Json:
    return {
        "type": "object",
        "properties": {**members, **(optional or {})},
        "required": list(members),
    }


def _list(item: Json, **limits: int) -> Json:
    return {"type": "array", "items": item, **limits}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, NULL]}


def _one_of(*values: str | None) -> Json:
    return {"enum": list(values)}


# -- OpenAI ------------------------------------------------------------------------------------------

_OPENAI_FINISH = _one_of("stop", "length", "tool_calls")
_UNFINISHED_OR = _one_of("stop", "length", "tool_calls", None)
_STOP_REASON: Json = {"type": ["string", "integer", "null"], "description": "the stop text or token id met"}
_BYTES = _list({"type": "integer", "minimum": 0, "maximum": 255})
_TOKEN_LOGPROB = _object(token=STRING, logprob=NUMBER, bytes=_BYTES)
_CHAT_LOGPROBS = _or_null(
    _object(
        content=_list(_object(token=STRING, logprob=NUMBER, bytes=_BYTES, top_logprobs=_list(_TOKEN_LOGPROB)))
    )
)
_LOGPROB_LISTS = _or_null(
    _object(
        text_offset=_list(COUNT),
        token_logprobs={**_list(NUMBER_OR_NULL), "description": "null for the first token of an echo"},
        tokens=_list(STRING),
        top_logprobs=_list({"type": ["object", "null"], "additionalProperties": NUMBER}),
    )
)
_PROMPT_LOGPROBS = _list(
    _or_null(
        {
            "type": "object",
            "additionalProperties": _object(logprob=NUMBER, rank=INTEGER, decoded_token=STRING),
        }
    )
)
_TOOL_CALL = _object(id=STRING, type={"const": "function"}, function=_object(name=STRING, arguments=STRING))
_TOOL_CALL_DELTA = _object(
    {"id": STRING, "type": {"const": "function"}, "function": _object({"name": STRING, "arguments": STRING})},
    index=COUNT,
)
_HEAD: Json = {"id": STRING, "created": INTEGER, "model": STRING}


def _openai(kind: str, optional: Json, choices: Json, usage: Json | None = None) -> Json:
    members = {"object": {"const": kind}, "choices": _list(choices), **(usage or {})}
    return _object(optional, **_HEAD, **members)


_USAGE_MEMBER = {"usage": ref("Usage")}
_TIMINGS: Json = {"prefill_time": NUMBER_OR_NULL, "decode_time_arr": _list(NUMBER)}

_OPENAI_SCHEMAS: dict[str, Json] = {
    "Usage": _object(
        {"completion_tokens_details": _object(reasoning_tokens=COUNT)},
        prompt_tokens=COUNT,
        prompt_tokens_details=_object(cached_tokens=COUNT),
        completion_tokens=COUNT,
        total_tokens=COUNT,
        batch_size={**_list(COUNT), "description": "of the step of every token"},
        queue_wait_time={**_list(COUNT), "description": "microseconds before the step of every token"},
    ),
    "ChatCompletion": _openai(
        "chat.completion",
        {**_TIMINGS, "prompt_logprobs": _PROMPT_LOGPROBS},
        _object(
            {"stop_reason": _STOP_REASON},
            index=COUNT,
            message=_object(
                {"reasoning_content": TEXT_OR_NULL},
                role={"const": "assistant"},
                content=STRING,
                tool_calls=_list(_TOOL_CALL),
            ),
            logprobs=_CHAT_LOGPROBS,
            finish_reason=_OPENAI_FINISH,
        ),
        _USAGE_MEMBER,
    ),
    "ChatCompletionChunk": _openai(
        "chat.completion.chunk",
        {**_USAGE_MEMBER, "full_text": STRING},
        _object(
            {"stop_reason": _STOP_REASON},
            index=COUNT,
            delta=_object(
                {"content": STRING, "reasoning_content": STRING, "tool_calls": _list(_TOOL_CALL_DELTA)},
                role={"const": "assistant"},
            ),
            logprobs=_CHAT_LOGPROBS,
            finish_reason=_UNFINISHED_OR,
        ),
    ),
    "Completion": _openai(
        "text_completion",
        _TIMINGS,
        _object(
            {"prompt_logprobs": _PROMPT_LOGPROBS},
            index=COUNT,
            text=STRING,
            logprobs=_LOGPROB_LISTS,
            stop_reason=_STOP_REASON,
            finish_reason=_OPENAI_FINISH,
        ),
        _USAGE_MEMBER,
    ),
    "CompletionChunk": _openai(
        "text_completion",
        _USAGE_MEMBER,
        _object(
            index=COUNT,
            text=STRING,
            logprobs=_LOGPROB_LISTS,
            stop_reason=_STOP_REASON,
            finish_reason=_UNFINISHED_OR,
        ),
    ),
    "Model": _object(
        id=STRING,
        object={"const": "model"},
        created=INTEGER,
        owned_by=STRING,
        root=STRING,
        parent=TEXT_OR_NULL,
        max_model_len=INTEGER,
    ),
    "ModelList": _object(object={"const": "list"}, data=_list(ref("Model"), minItems=1)),
}

# -- vLLM, TGI, Triton, MindIE -----------------------------------------------------------------------

_FINISH = _one_of("eos_token", "stop_sequence", "length")
_SPECIAL: Json = {"type": ["boolean", "null"]}
_TGI_TOKEN = _object(id=COUNT, logprob=NUMBER_OR_NULL, special=_SPECIAL, text=TEXT_OR_NULL)
_TGI_COUNTS: Json = {
    "prompt_tokens": COUNT,
    "finish_reason": _FINISH,
    "generated_tokens": COUNT,
    "seed": COUNT,
}
_IDS = _list(COUNT)
_PAIR = _list(COUNT, minItems=2, maxItems=2)
_PERF_STAT = {
    **_list(_PAIR),
    "description": "token id and milliseconds of every token",
}
_TRITON_HEAD: Json = {
    "id": STRING,
    "model_name": STRING,
    "model_version": NULL,
    "text_output": STRING,
}


def _triton_details(optional: Json, per_step: Json, required: Json) -> Json:
    return _object(
        {"perf_stat": _PERF_STAT, **optional},
        **required,
        generated_tokens=COUNT,
        first_token_cost=NUMBER_OR_NULL,
        decode_cost=NUMBER_OR_NULL,
        batch_size=per_step,
        queue_wait_time=per_step,
    )


_NATIVE_DETAILS = _object(finish_reason=_FINISH, generated_tokens=COUNT, seed=COUNT)

_OTHER_SCHEMAS: dict[str, Json] = {
    "VllmTexts": _object(text={**_list(STRING), "description": "prompt and answer of every choice"}),
    "VllmRecord": _object(text={**_list(STRING), "description": "what each choice gained"}),
    "TgiAnswer": _object(
        {"details": _object(**_TGI_COUNTS, prefill=_list(_TGI_TOKEN), tokens=_list(_TGI_TOKEN))},
        generated_text=STRING,
    ),
    "TgiAnswerList": _list(ref("TgiAnswer"), minItems=1, maxItems=1),
    "TgiFrame": _object(
        token=_object(id=_IDS, text=STRING, logprob=NUMBER_OR_NULL, special=_SPECIAL),
        generated_text=TEXT_OR_NULL,
        details=_or_null(_object(**_TGI_COUNTS)),
    ),
    "TritonAnswer": _object(
        {"details": _triton_details({}, _list(COUNT), {"finish_reason": _FINISH})}, **_TRITON_HEAD
    ),
    "TritonFrame": _object(
        {
            "details": _triton_details({"finish_reason": _FINISH}, COUNT, {}),
            "prefill_time": NUMBER_OR_NULL,
            "decode_time": NUMBER_OR_NULL,
        },
        **_TRITON_HEAD,
    ),
    "TritonTensors": _object(
        id=STRING,
        outputs=_list(
            _object(
                name=STRING,
                shape=_list(COUNT, minItems=2, maxItems=2),
                datatype={"const": "UINT32"},
                data=_IDS,
            ),
            minItems=1,
            maxItems=1,
        ),
    ),
    "StopInferAnswer": _object(id=STRING),
    "NativeAnswer": _object({"details": _NATIVE_DETAILS}, generated_text=STRING),
    "NativeFrame": _object(
        {"generated_text": STRING, "details": _or_null(_NATIVE_DETAILS)},
        prefill_time=NUMBER_OR_NULL,
        decode_time=NUMBER_OR_NULL,
        token=_object(id=_IDS, text=TEXT_OR_NULL),
    ),
    "TokenCount": _object(token_number=COUNT, tokens=_list(STRING)),
}

# -- the server, its model and its load --------------------------------------------------------------

_TENSORS = _list(_object(name=STRING, shape=_list(INTEGER), datatype=STRING))
_RESOURCE: Json = {
    name: COUNT
    for name in (
        "availSlotsNum",
        "availBlockNum",
        "waitingRequestNum",
        "runningRequestNum",
        "swappedRequestNum",
        "freeNpuBlockNums",
        "freeCpuBlockNums",
        "totalNpuBlockNums",
        "totalCpuBlockNums",
    )
}


def _status(**more: Json) -> Json:
    return _object(
        service=_object(roleStatus=STRING, currentRole=STRING),
        resource=_object(**_RESOURCE, **more),
        linkStatus=_object(peers=_list({})),
    )


_SERVER_SCHEMAS: dict[str, Json] = {
    "Error": _object(
        {"message": STRING, "request_id": {**STRING, "description": "the header RequestUUID"}},
        error={**STRING, "minLength": 1, "description": "field, value, legal range and next step"},
        error_type=STRING,
        type={**STRING, "description": "same as error_type"},
    ),
    "Message": _object(message=STRING),
    "Healthy": _object(status={"const": "healthy"}),
    "ServerMetadata": _object(
        name=STRING,
        version=STRING,
        extensions=_object(
            max_iter_times=INTEGER,
            prefill_policy_type=INTEGER,
            decode_policy_type=INTEGER,
            max_prefill_batch_size=INTEGER,
            max_prefill_tokens=INTEGER,
        ),
    ),
    "ModelMetadata": _object(name=STRING, platform=STRING, inputs=_TENSORS, outputs=_TENSORS),
    "ModelConfig": _object(
        model_name=STRING,
        input_datatype=STRING,
        output_datatype=STRING,
        max_seq_len=INTEGER,
        npu_mem_size={**INTEGER, "description": "-1: as much as is free"},
        cpu_mem_size=INTEGER,
        world_size=INTEGER,
        model_weight_path=STRING,
        model_instance_type=STRING,
    ),
    "SlotCount": _object(total_slots=COUNT, free_slots=COUNT, available_tokens_length=COUNT),
    "Info": _object(
        docker_label=TEXT_OR_NULL,
        max_batch_total_tokens=COUNT,
        max_best_of=COUNT,
        max_concurrent_requests=COUNT,
        max_stop_sequences=COUNT,
        max_waiting_tokens=NUMBER_OR_NULL,
        sha=TEXT_OR_NULL,
        validation_workers=NUMBER_OR_NULL,
        version=STRING,
        waiting_served_ratio=NUMBER_OR_NULL,
        models=_list(
            _object(
                model_device_type=_one_of("npu", "cuda", "cpu"),
                model_dtype=STRING,
                model_id=STRING,
                model_pipeline_tag=STRING,
                model_sha=TEXT_OR_NULL,
                max_total_tokens=COUNT,
            )
        ),
        max_input_length=COUNT,
        model_id=STRING,
        max_input_tokens=COUNT,
        max_total_tokens=COUNT,
    ),
    "ServerConfig": _object(
        modelName=STRING,
        maxSeqLen=INTEGER,
        npuMemSize=INTEGER,
        cpuMemSize=INTEGER,
        worldSize=INTEGER,
        maxOutputLen=INTEGER,
        cacheBlockSize=INTEGER,
    ),
    "Status": _status(),
    "StatusV2": _status(
        totalAvailNpuSlotsNum=COUNT,
        totalAvailNpuBlockNum=COUNT,
        maxAvailNpuBlockNum=COUNT,
        dpInstMap={"type": ["object", "array"]},
    ),
    "RunningStatus": _object(
        status={
            "enum": [0, 1, 2, 3, 4, 5],
            "description": "0 ready, 1 normal, 2 abnormal, 3 paused, 4 initialising, 5 busy",
        },
        errors=_list(_object(timestamp=INTEGER, errCode=STRING, createdBy=STRING)),
    ),
    "FaultHandling": _object(
        status={**BOOLEAN, "description": "whether the command was carried out"},
        message=STRING,
        reason=_list(
            _object(
                device_id={**INTEGER, "description": "number of the model instance"},
                result=_one_of("success", "fail"),
                message=STRING,
            )
        ),
    ),
    "MetricsVector": _object(
        resultType={"const": "vector"},
        result=_list(
            _object(
                metric=_list(_object(__name__=STRING, job=STRING, instance=STRING), minItems=1, maxItems=1),
                value=STRING,
            )
        ),
    ),
}

SCHEMAS: dict[str, Json] = {**_OPENAI_SCHEMAS, **_OTHER_SCHEMAS, **_SERVER_SCHEMAS}

# What a dialect answers, whole and streamed, by the adapter's name.
OF_ADAPTER: dict[str, tuple[str | None, str | None]] = {
    "openai_chat": ("ChatCompletion", "ChatCompletionChunk"),
    "openai_completions": ("Completion", "CompletionChunk"),
    "vllm_generate": ("VllmTexts", "VllmRecord"),
    "tgi_generate": ("TgiAnswer", None),
    "tgi_generate_stream": (None, "TgiFrame"),
    "tgi_root": ("TgiAnswerList", "TgiFrame"),
    "triton_generate": ("TritonAnswer", None),
    "triton_generate_stream": (None, "TritonFrame"),
    "triton_infer": ("TritonTensors", None),
    "mindie_native": ("NativeAnswer", "NativeFrame"),
}
