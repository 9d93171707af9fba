"""Other codebases' Flax models: Linen and NNX modules with adapted and quantized weights.

    model, params = jlora.from_linen(module, variables, x)      # as module.apply(variables, x)
    model, params = jlora.from_nnx(module)
    adapter = jlora.init_adapter(key, params, jlora.LoraConfig(target_modules=["query", "out"]))
    y = model(jlora.attach(params, adapter), x)                 # x @ W + s·(x @ A) @ B, factored
    module = model.native(jlora.merge(params, adapter))         # in the framework's own form

``params`` are the module's parameters as a tree of jlora's weights (``view``): a kernel of many
axes becomes a matrix (in, out), by the attributes of its layer. The products of Dense,
DenseGeneral, Einsum and Embed (in NNX of Linear, LinearGeneral, Einsum and Embed), and thereby
those of attention, are computed by ``jlora.dot``. Other layers get merged weights, and a warning
names them.
"""
