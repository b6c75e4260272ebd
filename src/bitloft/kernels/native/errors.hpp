// One sentence per thread about what went wrong, and the one way to report it: `return fail("...", ...)`.
#pragma once

namespace bl {

// Keeps the sentence for bl_error() and returns -1.
int fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace bl
