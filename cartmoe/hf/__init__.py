"""The compact models as models of the transformers library: `import cartmoe.hf` makes them known.

    model = cartmoe.hf.from_checkpoint("cartesian")
    cartmoe.hf.export("cartesian", "cartesian-hf")        # model and tokenizer
    AutoModelForCausalLM.from_pretrained("cartesian-hf")  # generate, Trainer, lm-eval, ...

Tensors have the names of `cartmoe.LanguageModel`, and are computed with by its modules. Routers and
experts are called as those of the library are, experts with hidden states, ids and weights, so that
whatever looks for a mixture of experts there finds one.

config.py, model.py   what the library runs;  export.py: from checkpoints, and back; tokenizers
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from cartmoe.hf.config import CartmoeConfig
from cartmoe.hf.export import export, from_checkpoint, from_native, to_native, tokenizer_of
from cartmoe.hf.model import CartmoeForCausalLM, CartmoeModel

AutoConfig.register("cartmoe", CartmoeConfig)
AutoModel.register(CartmoeConfig, CartmoeModel)
AutoModelForCausalLM.register(CartmoeConfig, CartmoeForCausalLM)
