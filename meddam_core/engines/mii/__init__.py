"""DAM under DeepSpeed-MII: the language model runs in MII FastGen, with visual tokens injected into its ragged batches.

Importing this package imports neither torch nor DeepSpeed; `meddam_core.engines.make_engine("mii", ...)` does.

Rooms, in the order a start goes through them:
- compat: versions, DeepSpeed's global state kept in bounds, the list of private names that are used;
- ops: the compiled kernels, from a per-node cache;
- weights: the language model handed over without a second copy, and handed back;
- model: Llama as FastGen builds it, plus the injection of visual rows; torch_kernels: its layers in plain torch;
- scheduler: MII's continuous batching and Dynamic SplitFuse without sockets, tokens in and captions out;
- startup: what is supported, how large the cache is, the logit check before serving;
- engine: the Engine protocol.

    kernels="cuda"    DeepSpeed's compiled kernels; NVIDIA SM 8.x and 9.0; bfloat16 and float16
    kernels="torch"   the same scheduler, cache and batches with torch layers; any device, float32 too
"""
