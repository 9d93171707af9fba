"""Flax models that are not ours: Linen and NNX modules run on adapted and packed weights.

    model, params = jlora.from_linen(module, variables, x)      # as module.apply(variables, x)
    model, params = jlora.from_nnx(module)
    adapter = jlora.init_adapter(key, params, jlora.LoraConfig(target_modules=["query", "out"]))
    y = model(jlora.attach(params, adapter), x)                 # x @ W + s·(x @ A) @ B, factored
    module = model.native(jlora.merge(params, adapter))         # in the framework's own form

``params`` are the module's parameters seen as jlora sees weights (``view``): a kernel of many axes
is a matrix (in, out), by what its layer says of it. The products of Dense, DenseGeneral, Einsum and
Embed (of Linear, LinearGeneral, Einsum and Embed in NNX), and so those of attention, are computed
by ``jlora.dot``. Other layers get the merged weight, and a warning names them.
"""
