/* One sparse product in blocks of 8 outputs and 4 inputs, as hand-written kernels of codecs and speech models have it.
 *
 * Every input is multiplied, whether zero or not. The 8 sums of a block row stay in a vector register. All arrays are
 * contiguous:
 *
 *     index    per block row: the number of its blocks, then the first input of each
 *     weights  the blocks in the order of `index`, 32 weights each
 *     x        (steps, batch, inputs)
 *     out      (batch, outputs), written anew in every step
 *
 * `inputs` and `outputs` are multiples of 4 and 8.
 */

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { OUTPUTS = 8, INPUTS = 4, BLOCK = OUTPUTS * INPUTS };

/* float32: sums start from zero and take their terms in ascending order of inputs. Weights lie input by input. */
static void multiply_float32(long outputs, const int *index, const float *weights, const float *x,
                             float *restrict out)
{
    for (long i = 0; i < outputs; i += OUTPUTS) {
        float sum[OUTPUTS] = {0};
        int blocks = *index++;
        for (int b = 0; b < blocks; b++, weights += BLOCK) {
            const float *values = x + *index++;
            for (int k = 0; k < INPUTS; k++)
                for (int r = 0; r < OUTPUTS; r++)
                    sum[r] += weights[OUTPUTS * k + r] * values[k];
        }
        for (int r = 0; r < OUTPUTS; r++)
            out[i + r] = sum[r];
    }
}

void product_float32(long steps, long batch, long inputs, long outputs, const int *index, const float *weights,
                     const float *x, float *out)
{
    for (long t = 0; t < steps; t++)
        for (long b = 0; b < batch; b++, x += inputs)
            multiply_float32(outputs, index, weights, x, out + b * outputs);
}

/* sum[r] += weights[4 r + k] * values[k], k < 4, r < 8. Weights are at most 64 in size: without VNNI, two products are
 * summed in 16 bits. */
#if defined(__AVX2__)
typedef __m256i sums;

static inline sums add_block(sums sum, const signed char *weights, const unsigned char *values)
{
    int four;
    memcpy(&four, values, INPUTS);
    __m256i w = _mm256_loadu_si256((const __m256i *)weights), x = _mm256_set1_epi32(four);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, x, w);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
#endif
}
#else
typedef struct { int of[OUTPUTS]; } sums;

static inline sums add_block(sums sum, const signed char *weights, const unsigned char *values)
{
    for (int r = 0; r < OUTPUTS; r++)
        for (int k = 0; k < INPUTS; k++)
            sum.of[r] += weights[INPUTS * r + k] * values[k];
    return sum;
}
#endif

/* int8: inputs in [-1, 1] become whole numbers of 0 to 254. Four blocks at a time have sums of their own, since a sum
 * that waits for the one before it takes longer than a block. Weights lie output by output.
 *
 *     scale  (outputs,): value of a unit of an integer sum
 *     zero   (outputs,): the integer sum of an input of zeros
 */
enum { CHAINS = 4 };

static void multiply_int8(long inputs, long outputs, const int *index, const signed char *weights, const float *scale,
                          const int *zero, const float *x, unsigned char *restrict rounded, float *restrict out)
{
    for (long j = 0; j < inputs; j++)
        rounded[j] = (unsigned char)(int)rintf(127.0f + 127.0f * x[j]);
    for (long i = 0; i < outputs; i += OUTPUTS) {
        sums chain[CHAINS];
        int part[CHAINS][OUTPUTS], blocks = *index++, b = 0;
        memset(chain, 0, sizeof chain);
        for (; b + CHAINS <= blocks; b += CHAINS, index += CHAINS, weights += CHAINS * BLOCK)
            for (int c = 0; c < CHAINS; c++)
                chain[c] = add_block(chain[c], weights + c * BLOCK, rounded + index[c]);
        for (; b < blocks; b++, weights += BLOCK)
            chain[0] = add_block(chain[0], weights, rounded + *index++);
        memcpy(part, chain, sizeof part);
        for (int r = 0; r < OUTPUTS; r++)
            out[i + r] = scale[i + r] * (float)(part[0][r] + part[1][r] + part[2][r] + part[3][r] - zero[i + r]);
    }
}

/* rounded: scratch, (inputs,) */
void product_int8(long steps, long batch, long inputs, long outputs, const int *index, const signed char *weights,
                  const float *scale, const int *zero, const float *x, unsigned char *rounded, float *out)
{
    for (long t = 0; t < steps; t++)
        for (long b = 0; b < batch; b++, x += inputs)
            multiply_int8(inputs, outputs, index, weights, scale, zero, x, rounded, out + b * outputs);
}
