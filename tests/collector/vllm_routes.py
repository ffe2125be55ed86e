"""The routes that vLLM 0.32.0 was seen to serve, as `METHOD /path`: what the table in `collector.routes` must know."""

GENERATION = """
GET /docs
GET /docs/oauth2-redirect
GET /health
GET /kv_event_sources
GET /load
GET /metrics
GET /openapi.json
GET /ping
GET /redoc
GET /v1/models
GET /v1/responses/{response_id}
GET /version
HEAD /docs
HEAD /docs/oauth2-redirect
HEAD /openapi.json
HEAD /redoc
POST /detokenize
POST /generative_scoring
POST /inference/v1/abort_requests
POST /inference/v1/generate
POST /invocations
POST /is_scaling_elastic_ep
POST /ping
POST /scale_elastic_ep
POST /tokenize
POST /v1/chat/completions
POST /v1/chat/completions/batch
POST /v1/chat/completions/derender
POST /v1/chat/completions/render
POST /v1/completions
POST /v1/completions/derender
POST /v1/completions/render
POST /v1/messages
POST /v1/messages/count_tokens
POST /v1/messages/render
POST /v1/responses
POST /v1/responses/render
POST /v1/responses/{response_id}/cancel
POST /v1/systemone
""".strip().splitlines()
"""Of a generation model, as started by default."""

DEVELOPMENT = """
DELETE /adapters/{adapter_name}
GET /get_world_size
GET /is_paused
GET /is_sleeping
GET /server_info
GET /tokenizer_info
GET /weight_info
POST /abort_requests
POST /adapters
POST /collective_rpc
POST /finish_weight_update
POST /init_weight_transfer_engine
POST /pause
POST /release_kv_cache_memory
POST /reset_encoder_cache
POST /reset_mm_cache
POST /reset_prefix_cache
POST /resume
POST /shutdown_weight_transfer_engine
POST /sleep
POST /start_draft_weight_update
POST /start_weight_update
POST /update_weight_version
POST /update_weights
POST /v1/load_lora_adapter
POST /v1/unload_lora_adapter
POST /wake_up
POST /weight_checker
""".strip().splitlines()
"""More of them with development mode and adapters loaded at run time."""

POOLING = """
POST /pooling
POST /rerank
POST /score
POST /v1/embeddings
POST /v1/rerank
POST /v1/score
POST /v2/embed
POST /v2/rerank
""".strip().splitlines()
"""Of a pooling model, beside those above."""
