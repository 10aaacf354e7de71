// Tells which sources the library was compiled from, see fingerprint.py.

#include "common.h"

PERSAMPLE_EXPORT const char* const persample_fingerprint = PERSAMPLE_FINGERPRINT;
