"""A stack in bf16 whose every text is, to the last bit, what it is alone.

In fp32 a text's company changes some last bits, which decide between tokens that are as good as
equally likely. In bf16 the same is a hundredth of a logit: a number that lies near the middle of
two of bf16's falls to one side or the other, and all that follows from it too. So nothing that is
computed of a row may depend on what stands beside it, and that is tried when a bundle is opened.
"""
