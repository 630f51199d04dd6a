/* Operands of operators, as the kernels that libraries.py generates take them: not at all. */
#include "runtime.h"

#include <stdlib.h>

/* Only their identity matters, and that none is nil. They are called with more arguments than are declared here. */
#define OPERAND(name) \
    void *aclCreate##name(void) { return malloc(1); } \
    int aclDestroy##name(void *operand) { \
        free(operand); \
        return ACL_SUCCESS; \
    }
OPERAND(Tensor)
OPERAND(Scalar)
OPERAND(IntArray)
OPERAND(FloatArray)
OPERAND(BoolArray)
OPERAND(TensorList)
OPERAND(ScalarList)
