# SPDX-License-Identifier: Apache-2.0
"""vLLM parameters that check what is loaded into them, know what is still missing, and pack weights on arrival.

vLLM's linear layers call one of four `load_*` methods per checkpoint tensor (weight loader v2). Each parameter here
turns such a call into "these rows of mine come from that part of the tensor", checks dtype, shape and values, and
notes the rows as filled. Nothing is replaced after loading, so every parameter can be loaded again.

vLLM's reload loads everything twice: first into parameters on the meta device, to count the elements that `copy_`
will write, then, when a layer is complete, into real ones that inherit the attributes of the former.
"""
