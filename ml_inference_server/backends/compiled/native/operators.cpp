// All operators as one source: torch's headers take the compiler longer than the operators, and are read once like
// this.
#include "encoder_layer.cpp"
#include "int8_layer.cpp"
#include "packed_attention.cpp"
